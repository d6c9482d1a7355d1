"""Table and figures of the runs in a folder."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

from ..errors import InputError
from .figures import draw
from .paper import paper_accuracies
from .results import Done, read

# figure, its heading, what it is multiplied by, decimals; those that no run has are left out
_COLUMNS = (
    ("test/auc", "AUC", 1, 3),
    ("test/eer", "equal error rate, %", 100, 1),
    ("test/tar_at_far_1e-2", "accepted at 1e-2 false accepts, %", 100, 1),
    ("test/angle", "angle of a sample to its class", 1, 1),
    ("test/weight_angle_min", "nearest class weights", 1, 1),
    ("test/centre_angle_min", "nearest class centres", 1, 1),
)


def report(folder: str | Path) -> list[dict[str, Any]]:
    """Makes ``results.csv``, ``table.md`` and the figures of the finished runs in a folder; nothing is trained.

    Args:
        folder: Of a comparison.

    Returns:
        A row for each run, as in ``results.csv``.

    Raises:
        InputError: If no run in the folder is finished.
    """
    folder = Path(folder)
    runs = sorted(read(folder), key=lambda run: ([_order(value) for value in run.swept.values()], run.margin, run.seed))
    if not runs:
        raise InputError(f"no run in {folder.absolute()} is finished; `compare` leaves them there.")
    rows = [run.row() for run in runs]
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list({name: None for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    table = _table(runs)
    (folder / "table.md").write_text(table)
    for name, figure in draw(runs):
        figure.savefig(folder / f"{name}.png", dpi=100)
    print(f"{table}\nTable, figures and runs are in {folder}")
    return rows


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then what else there is."""
    number = isinstance(value, int | float)
    return not number, value if number else 0.0, str(value)


def _table(runs: Sequence[Done]) -> str:
    first = runs[0].config
    monitor, mode = (first["checkpoint"].get(key) for key in ("monitor", "mode"))
    paper, source = paper_accuracies(first["data"])
    chosen = [(monitor, f"{monitor}", 1, 3)] if monitor else []
    columns = [column for column in (*chosen, *_COLUMNS) if any(column[0] in run.results for run in runs)]

    header = ["m", *(key.split(".")[-1] for key in runs[0].swept), "runs", "test accuracy, %"]
    header += ["difference to m = 1 (95 % interval)", *(title for _, title, *_ in columns)]
    lines = []
    for margin, swept in dict.fromkeys((run.margin, tuple(run.swept.values())) for run in runs):
        alike = [run for run in runs if tuple(run.swept.values()) == swept]
        own = [run for run in alike if run.margin == margin]
        cells = [
            str(margin),
            *map(str, swept),
            str(len(own)),
            mean_sd([run.results for run in own], "test/acc", 100, 2),
        ]
        cells.append(_difference(own, [run for run in alike if run.margin == 1]) if margin != 1 else "-")
        cells += [mean_sd([run.results for run in own], name, factor, digits) for name, _, factor, digits in columns]
        lines.append([*cells, *([paper.get(margin, "-")] if paper else [])])
    header += ["paper, %"] if paper else []

    facts = {name: " / ".join(dict.fromkeys(str(run.facts[name]) for run in runs)) for name in runs[0].facts}
    batch = first["data"].get("init_args", {}).get("batch_size")
    images = f" of {batch} images" if batch else ""
    packages = ", ".join(f"{name} {facts[name]}" for name in list(facts)[list(facts).index("machine") + 1 :])
    checkpoint = f"the checkpoint with the {mode}imum of {monitor}" if monitor else "the last checkpoint"
    notes = [
        f"Test figures are of {checkpoint}, mean ± standard deviation over seeds; angles in degrees. Differences are "
        "paired by seed, in percentage points, their interval is Student's.",
        f"{facts['steps']} steps{images}, on {facts['machine']} (threads a run: {facts['threads']}); {packages}.",
        *([source] if source else []),
    ]
    commands = "\n".join(dict.fromkeys(run.facts["command"] for run in runs))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
    return "\n\n".join([table, *notes, f"```sh\n{commands}\n```"]) + "\n"


def mean_sd(results: Sequence[Mapping[str, float]], name: str, factor: float, digits: int) -> str:
    """Mean and standard deviation of a figure in words."""
    values = [factor * figures[name] for figures in results if name in figures]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _difference(own: Sequence[Done], softmax: Sequence[Done]) -> str:
    """Mean difference in accuracy of runs to those of the same seeds at m = 1, in percentage points."""
    base = {run.seed: run.results.get("test/acc", math.nan) for run in softmax}
    gaps = [100 * (run.results.get("test/acc", math.nan) - base[run.seed]) for run in own if run.seed in base]
    if not gaps:
        return "-"
    mean = statistics.fmean(gaps)
    if len(gaps) == 1:
        return f"{mean:+.2f}"
    reach = t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean:+.2f} ({mean - reach:+.2f} to {mean + reach:+.2f})"
