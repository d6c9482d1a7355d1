"""lambda as a pure function of the optimiser step, so that a resumed run needs nothing saved.

Any callable ``(step, total_steps) -> lambda`` is a schedule, ``step`` being the optimiser steps already taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from .errors import InputError


class LambdaSchedule(ABC):
    """What the annealing callback and the command line take: ``schedule(step, total_steps)`` gives lambda."""

    @abstractmethod
    def __call__(self, step: int, total_steps: float) -> float:
        """Gives lambda for the next optimiser step.

        Args:
            step: Optimiser steps already taken, 0 at the start of a run.
            total_steps: Optimiser steps of the whole run; infinite or -1 where it is not known.
        """


@dataclass(frozen=True)
class PowerLaw(LambdaSchedule):
    """The authors' law: ``max(lambda_min, base * (1 + gamma * t) ** -power)`` with t = 1 at the first step.

    The names and defaults are those of the authors' Caffe layer and MNIST example; their t counts forward passes.

    Args:
        base: lambda before the first step.
        gamma: Speed, per step.
        power: Exponent.
        lambda_min: Where lambda stops falling.

    Raises:
        InputError: If an argument is negative or not finite.
    """

    base: float = 1000.0
    gamma: float = 2.5e-5
    power: float = 35.0
    lambda_min: float = 0.0

    def __post_init__(self) -> None:
        _check_non_negative(self)

    def __call__(self, step: int, total_steps: float = math.inf) -> float:
        """Gives lambda for the next optimiser step; the length of the run does not matter."""
        return max(self.lambda_min, self.base * math.pow(1 + self.gamma * (step + 1), -self.power))


@dataclass(frozen=True)
class Constant(LambdaSchedule):
    """The same lambda at every step; 0 is the paper's pure loss, which seldom converges from scratch.

    Args:
        value: lambda, 0 to infinity.

    Raises:
        InputError: If ``value`` is negative or NaN.
    """

    value: float

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise InputError(f"Constant takes a value from 0 to infinity, got {self.value}.")

    def __call__(self, step: int, total_steps: float = math.inf) -> float:
        """Gives lambda for the next optimiser step: always the value."""
        return self.value


@dataclass(frozen=True)
class RunFraction(LambdaSchedule):
    """From ``base`` to ``lambda_min`` over a fraction of the run, whatever its length.

    ``1 + lambda`` falls geometrically, so that the margin's share of the target logit, 1 / (1 + lambda), grows by the
    same factor every step, and ``lambda_min`` may be 0.

    Args:
        base: lambda at the first step.
        lambda_min: lambda once ``fraction`` of the run is over. 0 is the paper's pure loss, which a network must be
            able enough to follow; the default is at the safe end of what the authors advise for large data.
        fraction: Share of the run's optimiser steps, above 0 and at most 1.

    Raises:
        InputError: If an argument is out of range, or the run has no end.
    """

    base: float = 1000.0
    lambda_min: float = 5.0
    fraction: float = 0.5

    def __post_init__(self) -> None:
        _check_non_negative(self)
        if not 0 < self.fraction <= 1:
            raise InputError(f"RunFraction takes a fraction above 0 and at most 1, got {self.fraction}.")
        if self.lambda_min > self.base:
            raise InputError(f"RunFraction falls from base to lambda_min, got {self.base} to {self.lambda_min}.")

    def __call__(self, step: int, total_steps: float) -> float:
        """Gives lambda for the next optimiser step of a run of ``total_steps``."""
        if not 0 < total_steps < math.inf:
            raise InputError(
                "RunFraction needs a run of known length: set the Trainer's max_steps or max_epochs (max_time does not "
                "tell, nor does max_epochs for data without a length)."
            )
        progress = step / (self.fraction * total_steps)
        if progress >= 1:
            return self.lambda_min
        return math.pow(1 + self.base, 1 - progress) * math.pow(1 + self.lambda_min, progress) - 1


def _check_non_negative(schedule: PowerLaw | RunFraction) -> None:
    for name, value in vars(schedule).items():
        if not 0 <= value < math.inf:
            raise InputError(f"{type(schedule).__name__} takes a finite {name} >= 0, got {value}.")
