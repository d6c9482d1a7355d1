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
        """Return lambda for the next optimiser step.

        Args:
            step: Optimiser steps already taken, 0 at the start of a run.
            total_steps: Optimiser steps of the run; infinite or -1 if they are unknown.
        """


@dataclass(frozen=True)
class AccuracyFeedback(LambdaSchedule):
    """lambda as a bounded function of the training accuracy: ``gain * ((1 - accuracy) / accuracy) ** power``.

    ``accuracy`` is the accuracy of the training logits, which contain the margin at the current lambda. The margin
    tightens while the network satisfies it on the training samples, and loosens when the accuracy falls (negative
    feedback). The schedule therefore needs neither the length of the run nor ``lambda_min``. It is not from the paper,
    where lambda depends only on the step.

    Args:
        gain: lambda at an accuracy of 1/2. A larger gain delays the margin.
        power: Steepness, at most 10. A larger power narrows the range of accuracies over which lambda changes.
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
        _check_bounds(self)
        if self.power > 10:
            raise InputError(f"power: must be at most 10, got {self.power}; the usual value is 3.")
        if self.accuracy_decay >= 1:
            raise InputError(f"accuracy_decay: must be below 1, got {self.accuracy_decay}; the usual value is 0.95.")

    def __call__(self, step: int, total_steps: float = math.inf, accuracy: float = 0.0) -> float:
        """Return lambda for the next optimiser step.

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
    """The schedule of the authors: ``max(lambda_min, base * (1 + gamma * t) ** -power)`` with t = 1 at the first step.

    The names and defaults are those of the authors' Caffe layer and MNIST example; their t counts forward passes.

    Args:
        base: lambda before the first step.
        gamma: Speed of the decay, per step.
        power: Exponent.
        lambda_min: Lower bound of lambda.

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
        """Return lambda for the next optimiser step; the length of the run has no effect."""
        return max(self.lambda_min, self.base * math.pow(1 + self.gamma * (step + 1), -self.power))


@dataclass(frozen=True)
class Constant(LambdaSchedule):
    """A constant lambda; 0 is the pure loss of the paper, which rarely converges from scratch.

    Args:
        value: lambda, 0 to infinity.

    Raises:
        InputError: If ``value`` is negative or NaN.
    """

    value: float

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise InputError(f"value: must be at least 0 for Constant, got {self.value}; set it from 0 to infinity.")

    def __call__(self, step: int, total_steps: float = math.inf) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class RunFraction(LambdaSchedule):
    """lambda that falls from ``base`` to ``lambda_min`` over a fraction of the run.

    ``1 + lambda`` falls geometrically. The fraction of the margin in the target logit, 1 / (1 + lambda), therefore
    grows by the same factor every step, and ``lambda_min`` may be 0.

    Args:
        base: lambda at the first step.
        lambda_min: lambda after ``fraction`` of the run. 0 is the pure loss of the paper, which needs a network of
            sufficient capacity. The default is at the safe end of the authors' advice for large data.
        fraction: Fraction of the optimiser steps of the run, above 0 and at most 1.

    Raises:
        InputError: If an argument is out of range, or the run has no end.
    """

    base: float = 1000.0
    lambda_min: float = 5.0
    fraction: float = 0.5

    def __post_init__(self) -> None:
        _check_non_negative(self)
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction: must be above 0 and at most 1, got {self.fraction}; the usual value is 0.5.")
        _check_bounds(self)

    def __call__(self, step: int, total_steps: float) -> float:
        """Return lambda for the next optimiser step of a run of ``total_steps``."""
        if not 0 < total_steps < math.inf:
            raise InputError(
                f"total_steps: RunFraction needs a run of known length, got {total_steps}; set the Trainer's max_steps "
                "or max_epochs (max_time is not enough, nor is max_epochs for data without a length)."
            )
        progress = step / (self.fraction * total_steps)
        if progress >= 1:
            return self.lambda_min
        return math.pow(1 + self.base, 1 - progress) * math.pow(1 + self.lambda_min, progress) - 1


def _check_bounds(schedule: AccuracyFeedback | RunFraction) -> None:
    if schedule.lambda_min > schedule.base:
        raise InputError(
            f"lambda_min: must not exceed base, got {schedule.lambda_min} and {schedule.base}; lower lambda_min."
        )


def _check_non_negative(schedule: AccuracyFeedback | PowerLaw | RunFraction) -> None:
    for name, value in vars(schedule).items():
        if not 0 <= value < math.inf:
            raise InputError(f"{name}: must be finite and at least 0, got {value}; set another {name}.")
