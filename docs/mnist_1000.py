"""Plot the test accuracy by margin, with a line for each seed: the plot of the README.

Usage: python docs/mnist_1000.py OUTPUT TITLE=RESULTS_CSV ...
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(axes: Axes, path: Path) -> None:
    """Plot the runs of a comparison.

    Args:
        axes: Axes to draw on.
        path: ``results.csv`` of the comparison.
    """
    seeds: dict[str, dict[int, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            seeds[row["seed"]][int(row["margin"])] = 100 * float(row["test/acc"])
    margins = sorted(next(iter(seeds.values())))
    for accuracy in seeds.values():
        axes.plot(margins, [accuracy[margin] for margin in margins], ".-", color="tab:gray", alpha=0.5, linewidth=1)
    means = [statistics.fmean(accuracy[margin] for accuracy in seeds.values()) for margin in margins]
    axes.plot(margins, means, "o-", color="tab:blue", linewidth=2, label=f"mean of {len(seeds)} seeds")
    axes.set_xticks(margins)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")


def main(output: str, *parts: str) -> None:
    """Save a plot with a panel for each comparison."""
    figure = Figure(figsize=(4.5 * len(parts), 3.6), layout="constrained")
    for part, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False).flat, strict=True):
        title, path = part.rsplit("=", 1)
        axes.set(title=title, xlabel="margin m", ylabel="test accuracy, %")
        draw(axes, Path(path))
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
