"""Schedules of lambda."""

import math
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.schedules import AccuracyFeedback, Constant, LambdaSchedule, PowerLaw, RunFraction


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [  # examples of the authors at iterations 1k, 5k, 10k and 15k, rounded to two or three digits
        (PowerLaw(), (421, 16, 0.41, 0.014)),
        (PowerLaw(gamma=2e-5, power=45), (410, 14, 0.27, 0.0075)),
        (PowerLaw(gamma=1e-5, power=45), (639, 111, 14, 1.9)),
    ],
)
def test_power_law_gives_the_values_of_the_authors(schedule: PowerLaw, expected: tuple[float, ...]) -> None:
    for iteration, lambda_ in zip((1000, 5000, 10_000, 15_000), expected, strict=True):
        assert schedule(iteration - 1) == pytest.approx(lambda_, rel=0.05)  # the authors count from 1


def test_power_law_stops_at_lambda_min() -> None:
    assert PowerLaw(lambda_min=5.0)(10**6) == 5.0


@given(
    base=st.floats(0, 1e6),
    minimum=st.floats(0, 1),
    fraction=st.floats(0.01, 1),
    total=st.integers(1, 10**6),
)
def test_run_fraction_falls_from_base_to_minimum(base: float, minimum: float, fraction: float, total: int) -> None:
    schedule = RunFraction(base, base * minimum, fraction)
    values = [schedule(round(total * part), total) for part in (0, 0.1, 0.5, 0.9, 1)]
    assert values[0] == pytest.approx(base)
    assert values[-1] == base * minimum
    assert all(a >= b - 1e-9 * (1 + base) for a, b in pairwise(values))


def test_run_fraction_does_not_depend_on_the_length_of_the_run() -> None:
    schedule = RunFraction(lambda_min=0)
    assert schedule(10, 100) == pytest.approx(schedule(1000, 10_000))
    assert schedule(50, 100) == 0
    weights = [1 / (1 + schedule(step, 100)) for step in range(5)]
    ratios = [later / earlier for earlier, later in pairwise(weights)]
    assert ratios == pytest.approx([ratios[0]] * 4)  # the weight of the margin grows by the same factor every step


def test_run_fraction_needs_the_length_of_the_run() -> None:
    for unknown in (math.inf, -1):  # the Trainer returns -1 for data without a length
        with pytest.raises(InputError, match="max_steps, or max_epochs"):
            RunFraction()(0, unknown)


def test_feedback_is_the_published_rule() -> None:
    assert AccuracyFeedback()(0) == 1000
    assert AccuracyFeedback()(7, accuracy=0.8) == pytest.approx(1000 * 0.25**3)
    assert AccuracyFeedback(gain=20, power=1)(7, 100, 0.9) == pytest.approx(20 / 9)
    assert AccuracyFeedback()(7, accuracy=1.0) == 0
    assert AccuracyFeedback(lambda_min=2.0)(7, accuracy=1.0) == 2


@given(
    gain=st.floats(0, 1e6),
    power=st.floats(0, 10),
    base=st.floats(0, 1e6),
    fraction=st.floats(0, 1),
    accuracies=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_feedback_falls_with_accuracy_within_its_bounds(
    gain: float, power: float, base: float, fraction: float, accuracies: tuple[float, float]
) -> None:
    schedule = AccuracyFeedback(gain, power, fraction * base, base)
    lower, higher = (schedule(0, accuracy=accuracy) for accuracy in sorted(accuracies))
    assert base >= lower >= higher >= fraction * base


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PowerLaw, {"gamma": -1}, "gamma"),
        (PowerLaw, {"base": math.inf}, "base"),
        (PowerLaw, {"lambda_min": math.nan}, "lambda_min"),
        (Constant, {"value": -1}, "^value: .* Constant, got -1"),
        (Constant, {"value": math.nan}, "^value: .* Constant, got nan"),
        (AccuracyFeedback, {"gain": -1}, "gain"),
        (AccuracyFeedback, {"power": math.nan}, "power"),
        (AccuracyFeedback, {"power": 35}, "power"),
        (AccuracyFeedback, {"accuracy_decay": 1.0}, "accuracy_decay"),
        (AccuracyFeedback, {"base": 1, "lambda_min": 2}, "lambda_min"),
        (RunFraction, {"fraction": 0}, "fraction"),
        (RunFraction, {"fraction": 1.1}, "fraction"),
        (RunFraction, {"base": 1, "lambda_min": 2}, "^lambda_min: must not exceed base"),
    ],
)
def test_invalid_settings_are_rejected(kind: type[LambdaSchedule], settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**settings)


@pytest.mark.parametrize("schedule", [AccuracyFeedback(), PowerLaw(), Constant(math.inf), RunFraction()])
def test_schedules_compare_by_value(schedule: LambdaSchedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
