"""Compare the confusion matrices of two margins: the pairs of classes whose confusions change most.

Usage: python docs/confused_pairs.py COUNTS_CSV               print the table
       python docs/confused_pairs.py COUNTS_CSV FOLDER 1 4    first write the counts of a comparison
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from lsoftmax_lightning.atomic import write_csv
from lsoftmax_lightning.compare.intervals import mean_and_interval
from lsoftmax_lightning.compare.results import read
from lsoftmax_lightning.compare.text import markdown_table

NUM_PAIRS = 8  # pairs in the table


def write_counts(path: Path, folder: Path, margins: set[int]) -> None:
    """Write the number of confused test images of each run of a comparison."""
    rows = [["margin", "seed", "target", "prediction", "images"]]
    for run in sorted(read(folder), key=lambda run: (run.margin, run.seed)):
        if run.margin not in margins:
            continue
        record = run.record()
        names, counts = record["class_names"], record["counts"]
        for target, prediction in counts.fill_diagonal_(0).nonzero().tolist():
            images = int(counts[target, prediction])
            rows.append([run.margin, run.seed, names[target], names[prediction], images])
    write_csv(path, rows)


def table(path: Path) -> str:
    """Format the pairs of classes whose confusions change most; both directions are added."""
    confused: dict[tuple[str, str], dict[tuple[int, int], int]] = defaultdict(lambda: defaultdict(int))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            first, second = sorted((row["target"], row["prediction"]))
            run = int(row["margin"]), int(row["seed"])
            for pair in ((first, second), ("all pairs", "")):
                confused[pair][run] += int(row["images"])
    runs = list(confused["all pairs", ""])
    low, high = min(margin for margin, _ in runs), max(margin for margin, _ in runs)
    seeds = sorted({seed for margin, seed in runs if margin == low} & {seed for margin, seed in runs if margin == high})
    counts = {pair: {m: [images[m, seed] for seed in seeds] for m in (low, high)} for pair, images in confused.items()}
    change = {pair: [b - a for a, b in zip(both[low], both[high], strict=True)] for pair, both in counts.items()}
    pairs = sorted(change, key=lambda pair: -abs(sum(change[pair])))[: NUM_PAIRS + 1]
    header = ["pair of classes", f"confused images, m = {low}", f"m = {high}", "change (95 % interval)"]
    lines = []
    for pair in sorted(pairs, key=lambda pair: sum(change[pair])):
        means = [f"{statistics.fmean(counts[pair][m]):.1f}" for m in (low, high)]
        lines.append([", ".join(filter(None, pair)), *means, mean_and_interval(change[pair])])
    return markdown_table(header, lines)


def main(counts: str, folder: str = "", *margins: str) -> None:
    """Write the counts if a folder is given, and print the table."""
    if folder:
        write_counts(Path(counts), Path(folder), set(map(int, margins)))
    print(table(Path(counts)))


if __name__ == "__main__":
    main(*sys.argv[1:])
