"""Schedules of lambda: pure functions of the optimiser step, the length of the run and the training accuracy.

Any callable ``(step, total_steps) -> lambda`` is a schedule, where ``step`` counts the optimiser steps already taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from .errors import InputError


class LambdaSchedule(ABC):
    """Base of the schedules: ``schedule(step, total_steps)`` returns lambda for the next optimiser step.

    Attributes:
        accuracy_decay: None for a schedule of the step alone. A schedule that sets it, from 0 to below 1, is called as
            ``schedule(step, total_steps, accuracy)``, where ``accuracy`` is the exponential mean, with this decay per
            optimiser step, of the accuracy of the training logits. The mean starts at 0.
    """

    accuracy_decay: float | None = None

    @abstractmethod
    def __call__(self, step: int, total_steps: float) -> float:
        """Returns lambda for the next optimiser step.

        Args:
            step: Optimiser steps already taken, 0 at the start of a run.
            total_steps: Optimiser steps of the whole run; infinite or -1 where it is not known.
        """


@dataclass(frozen=True)
class AccuracyFeedback(LambdaSchedule):
    """lambda that follows the network: ``gain * ((1 - accuracy) / accuracy) ** power``, bounded.

    ``accuracy`` is that of the training logits, which carry the margin at the present lambda. The margin tightens only
    as far as the network satisfies it on its training samples, and loosens when accuracy falls (negative feedback).
    So neither the length of the run nor ``lambda_min`` has to be chosen. The rule is ours; the paper's lambda depends
    on the step alone.

    Args:
        gain: lambda at an accuracy of 1/2. A larger gain lets the margin in later.
        power: Steepness, at most 10. The larger it is, the narrower the range of accuracies over which lambda changes.
        lambda_min: Lower bound of lambda.
        base: Upper bound of lambda, and its value before the first step.
        accuracy_decay: Decay of the mean accuracy per optimiser step: 0.95 averages about 20 steps.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> from lsoftmax_lightning.schedules import AccuracyFeedback
        >>> schedule = AccuracyFeedback()
        >>> schedule(0), round(schedule(100, accuracy=0.9), 2), schedule(200, accuracy=1.0)
        (1000.0, 1.37, 0.0)
    """

    gain: float = 1000.0
    power: float = 3.0
    lambda_min: float = 0.0
    base: float = 1000.0
    accuracy_decay: float = 0.95

    def __post_init__(self) -> None:
        _check_non_negative(self)
        if self.lambda_min > self.base:
            raise InputError(
                f"lambda_min: must not exceed base, got {self.lambda_min} and {self.base}; lower lambda_min."
            )
        if self.power > 10:
            raise InputError(f"power: must be at most 10, got {self.power}; the usual value is 3.")
        if self.accuracy_decay >= 1:
            raise InputError(f"accuracy_decay: must be below 1, got {self.accuracy_decay}; the usual value is 0.95.")

    def __call__(self, step: int, total_steps: float = math.inf, accuracy: float = 0.0) -> float:
        """Returns lambda for the next optimiser step.

        Args:
            step: Not used.
            total_steps: Not used.
            accuracy: Mean accuracy of the training logits, 0 to 1.
        """
        if accuracy <= 0:
            return self.base
        if accuracy >= 1:
            return self.lambda_min
        odds = max(accuracy / (1 - accuracy), 1e-9)  # bounded, so that no power underflows to 0
        return min(self.base, max(self.lambda_min, self.gain / math.pow(odds, self.power)))


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
        """Returns lambda for the next optimiser step; the length of the run has no effect."""
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


def _check_non_negative(schedule: AccuracyFeedback | PowerLaw | RunFraction) -> None:
    for name, value in vars(schedule).items():
        if not 0 <= value < math.inf:
            raise InputError(f"{name}: must be finite and at least 0, got {value}; set another {name}.")
