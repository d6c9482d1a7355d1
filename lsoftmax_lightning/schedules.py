"""Schedules of lambda: pure functions of the optimizer step, the length of the run and the training accuracy.

Any callable ``(step, total_steps) -> lambda`` is a schedule. ``step`` is the number of optimizer steps already taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from .errors import InputError


class LambdaSchedule(ABC):
    """Base class of the schedules: ``schedule(step, total_steps)`` returns lambda for the next optimizer step.

    Attributes:
        accuracy_decay: None if the schedule depends only on the step. With a number, from 0 to below 1, the schedule is
            called as ``schedule(step, total_steps, accuracy)``. ``accuracy`` is the exponential mean of the accuracy
            of the training logits, with this decay per optimizer step. The mean starts at 0.
    """

    accuracy_decay: float | None = None

    @abstractmethod
    def __call__(self, step: int, total_steps: float) -> float:
        """Return lambda for the next optimiser step.

        Args:
            step: Number of optimizer steps already taken, 0 at the start of a run.
            total_steps: Number of optimizer steps of the run; infinite or -1 if it is unknown.
        """


@dataclass(frozen=True)
class AccuracyFeedback(LambdaSchedule):
    """lambda as a bounded function of the training accuracy: ``gain * ((1 - accuracy) / accuracy) ** power``.

    ``accuracy`` is the accuracy of the training logits, which contain the margin at the current lambda. lambda falls as
    the network learns to classify the training samples with the margin, and rises if the accuracy falls (negative
    feedback). The schedule needs neither the length of the run nor a ``lambda_min``. It is not from the paper, where
    lambda depends only on the step.

    Args:
        gain: lambda at an accuracy of 1/2. A larger gain delays the margin.
        power: Steepness, at most 10. With a larger power, lambda changes over a narrower range of accuracies.
        lambda_min: Lower bound of lambda.
        base: Upper bound of lambda, and its value at the first step.
        accuracy_decay: Decay of the mean accuracy per optimizer step, from 0 to below 1. 0.95 averages about 20 steps.

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
        odds = max(accuracy / (1 - accuracy), 1e-9)  # bounded, because a power of it could underflow to 0
        return min(self.base, max(self.lambda_min, self.gain / math.pow(odds, self.power)))


@dataclass(frozen=True)
class PowerLaw(LambdaSchedule):
    """The authors' schedule: ``max(lambda_min, base * (1 + gamma * t) ** -power)``, with t = 1 at the first step.

    The names are those of the authors' Caffe layer, and the defaults those of its MNIST example. t counts optimizer
    steps here, and training forward passes in the Caffe layer.

    Args:
        base: lambda at t = 0, before the first step.
        gamma: Speed of the decay, per step.
        power: Exponent.
        lambda_min: Lower bound of lambda.

    Raises:
        InputError: If an argument is negative or not finite.

    Example:
        >>> from lsoftmax_lightning.schedules import PowerLaw
        >>> schedule = PowerLaw()
        >>> round(schedule(0), 1), round(schedule(5000), 1)
        (999.1, 16.2)
    """

    base: float = 1000.0
    gamma: float = 2.5e-5
    power: float = 35.0
    lambda_min: float = 0.0

    def __post_init__(self) -> None:
        _check_non_negative(self)

    def __call__(self, step: int, total_steps: float = math.inf) -> float:
        """Return lambda for the next optimizer step; ``total_steps`` is not used."""
        return max(self.lambda_min, self.base * math.pow(1 + self.gamma * (step + 1), -self.power))


@dataclass(frozen=True)
class Constant(LambdaSchedule):
    """Constant lambda; 0 is the pure loss of the paper, which rarely converges from scratch.

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
        """Return ``value``."""
        return self.value


@dataclass(frozen=True)
class RunFraction(LambdaSchedule):
    """Geometric decay of ``1 + lambda`` from ``base`` to ``lambda_min`` over a fraction of the run.

    The weight of the margin in the target logit, 1 / (1 + lambda), grows by the same factor at every step.
    ``lambda_min`` may be 0.

    Args:
        base: lambda at the first step.
        lambda_min: lambda after ``fraction`` of the run. 0 is the pure loss of the paper, which needs a network of
            sufficient capacity. The authors of the paper advise 5 or 10 for large data sets.
        fraction: Fraction of the optimizer steps of the run, above 0 and at most 1.

    Raises:
        InputError: If an argument is out of range, or the length of the run is unknown.

    Example:
        >>> from lsoftmax_lightning.schedules import RunFraction
        >>> schedule = RunFraction()
        >>> [round(schedule(step, total_steps=1000)) for step in (0, 250, 500, 999)]
        [1000, 76, 5, 5]
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
        """Return lambda for the next optimizer step of a run of ``total_steps``."""
        if not 0 < total_steps < math.inf:
            raise InputError(
                f"total_steps: must be known for RunFraction, got {total_steps}; set the Trainer's max_steps, or "
                "max_epochs if the data have a length (max_time is not enough)."
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
            raise InputError(f"{name}: must be finite and at least 0, got {value}; choose another value.")
