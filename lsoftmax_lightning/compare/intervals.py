"""Means and differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t

from .results import FinishedRun


def paired_differences(runs: Sequence[FinishedRun], baseline: Sequence[FinishedRun]) -> list[float]:
    """Return the differences of the test accuracy between paired runs, in percentage points.

    Args:
        runs: Runs of one margin. Runs without a counterpart are left out.
        baseline: Runs to subtract.
    """
    base = {run.pairing_key: run.metrics["test/acc"] for run in baseline if "test/acc" in run.metrics}
    shared = [run for run in runs if run.pairing_key in base and "test/acc" in run.metrics]
    return [100 * (run.metrics["test/acc"] - base[run.pairing_key]) for run in shared]


def standard_deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of several values; NaN if one is NaN or infinite, which ``statistics`` rejects."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def half_interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval (Student's t) of a mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    # not ttest_1samp(values, 0).confidence_interval(), which warns if all values are equal
    return float(t.ppf(0.975, len(values) - 1)) * standard_deviation(values) / math.sqrt(len(values))


def mean_and_interval(values: Sequence[float]) -> str:
    """Format the mean of differences, with its 95 % interval (Student's t) if there are several."""
    mean, half = statistics.fmean(values), half_interval(values)
    return f"{mean:+.2f}" if math.isnan(half) else f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
