"""Table and figures of the runs in a folder."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

from ..atomic import atomic_path, write_csv, write_text
from ..errors import InputError
from .figures import draw
from .paper import paper_accuracies
from .provenance import PACKAGES
from .results import Done, file_name, read, train_settings

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

    In ``results.csv``, texts that a spreadsheet would run as a formula have a ``'`` in front.

    Args:
        folder: Of a comparison.

    Returns:
        A row for each run, as in ``results.csv``.

    Raises:
        InputError: If no run in the folder is finished, or the ``config.yaml`` of one is damaged.
    """
    folder = Path(folder)
    runs = sorted(read(folder), key=_order)
    if not runs:
        raise InputError(f"no run in {folder.absolute()} is finished; `compare` leaves them there.")
    rows = [run.row() for run in runs]
    columns = list({name: None for row in rows for name in row})
    write_csv(folder / "results.csv", [columns, *([row.get(name, "") for name in columns] for row in rows)])
    table = _table(runs)
    write_text(folder / "table.md", table)
    for name, figure in draw(runs):
        with atomic_path(folder / f"{file_name(name)}.png") as part:
            figure.savefig(part, format="png", dpi=100)
    print(f"{table}\nTable, figures and runs are in {folder}")
    return rows


def _order(run: Done) -> tuple[Any, ...]:
    """Numbers by size, then what else there is."""
    values = run.swept.values()
    numbers = [value if isinstance(value, int | float) else math.inf for value in values]
    return list(run.swept), numbers, list(map(str, values)), run.margin, run.seed


def _table(runs: Sequence[Done]) -> str:
    monitor, mode = (runs[0].config["checkpoint"].get(key) for key in ("monitor", "mode"))
    share = str(monitor).endswith("acc")
    columns = [(monitor, f"{monitor}, %", 100, 2) if share else (monitor, monitor, 1, 3), *_COLUMNS]
    columns = [column for column in columns if any(column[0] in run.results for run in runs)]
    keys = list(dict.fromkeys(key for run in runs for key in run.swept))
    papers = [paper_accuracies(run.config) for run in runs]

    header = ["m", *keys, "runs", "test accuracy, %", "difference to m = 1 (95 % interval)"]
    header += [title for _, title, *_ in columns] + ["paper, %"] * any(papers)
    lines = []
    for setting, margin in dict.fromkeys((run.setting, run.margin) for run in runs):
        alike = [run for run in runs if run.setting == setting]
        own = [run for run in alike if run.margin == margin]
        paper, _ = papers[runs.index(own[0])] or ({}, "")
        lines.append(
            [
                *(str(margin), *(str(own[0].swept.get(key, "-")) for key in keys), str(len(own))),
                *(_mean(own, "test/acc", 100, 2), _difference(own, [run for run in alike if run.margin == 1])),
                *(_mean(own, name, factor, digits) for name, _, factor, digits in columns),
                *[paper.get(margin, "-")] * any(papers),
            ]
        )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))

    validated = any(monitor in run.results for run in runs)
    chosen = f"the checkpoint with the {mode}imum of {monitor}" if validated else "the last checkpoint"
    facts = {name: _distinct(run.facts.get(name, "?") for run in runs) for name in runs[-1].facts}
    data = f"batch_size {_distinct(run.config['data'].get('init_args', {}).get('batch_size') for run in runs)}"
    settings = [train_settings(run.config) for run in runs]
    for name in dict.fromkeys(itertools.chain.from_iterable(settings)):
        data += f", {name} {_distinct(values.get(name, 'not set') for values in settings)}"
    packages = ", ".join(f"{name} {facts[name]}" for name in ("python", *PACKAGES) if name in facts)
    notes = [
        f"Test figures are of {chosen}, mean ± standard deviation over seeds; angles in degrees. Differences are of "
        "the same seeds, in percentage points, their interval is Student's.",
        f"{facts['steps']} steps, {data}, on {facts['machine']} (threads a run: {facts['threads']}); {packages}.",
        *dict.fromkeys(paper[1] for paper in papers if paper),
    ]
    commands = "\n".join(dict.fromkeys(run.facts["command"] for run in runs))
    return "\n\n".join([table, *notes, f"```sh\n{commands}\n```"]) + "\n"


def _distinct(values: Iterable[Any]) -> str:
    """Join the distinct values of the runs."""
    return " / ".join(dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in values))


def _mean(runs: Sequence[Done], name: str, factor: float, digits: int) -> str:
    """Mean and standard deviation of a figure."""
    values = [factor * run.results[name] for run in runs if name in run.results]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _difference(own: Sequence[Done], softmax: Sequence[Done]) -> str:
    """Mean difference in accuracy of runs to those of the same seeds at m = 1, in percentage points."""
    base = {run.seed: run.results["test/acc"] for run in softmax if "test/acc" in run.results}
    shared = [run for run in own if run.seed in base and "test/acc" in run.results]
    gaps = [100 * (run.results["test/acc"] - base[run.seed]) for run in shared]
    if not gaps or own[0].margin == 1:
        return "-"
    return mean_and_interval(gaps)


def mean_and_interval(values: Sequence[float]) -> str:
    """Format the mean of differences, with the 95 % interval of Student's t if there are several."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:+.2f}"
    reach = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2f} ({mean - reach:+.2f} to {mean + reach:+.2f})"
