"""Table and figures of finished runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_path, write_csv, write_text
from ..errors import InputError
from .figures import draw
from .intervals import mean_and_interval, paired_differences
from .paper import PAPER_ACCURACIES, paper_source
from .provenance import PACKAGES
from .results import FinishedRun, file_name, is_number, read, setting_names

# metric, title, factor and decimals; those that no run has are left out
_COLUMNS = (
    ("val/acc", "val/acc, %", 100, 2),
    ("val/loss", "val/loss", 1, 3),
    ("test/auc", "AUC", 1, 3),
    ("test/eer", "equal error rate, %", 100, 1),
    ("test/tar_at_far_1e-2", "accepted at 1e-2 false accepts, %", 100, 1),
    ("test/angle", "angle of a sample to its class", 1, 1),
    ("test/weight_angle_min", "nearest class weights", 1, 1),
    ("test/centre_angle_min", "nearest class centres", 1, 1),
)


def report(paths: str | Path | Sequence[str | Path], folder: str | Path | None = None) -> list[dict[str, Any]]:
    """Make ``results.csv``, ``table.md`` and the figures of finished runs, without training.

    In ``results.csv``, texts that a spreadsheet would run as a formula have a ``'`` in front.

    Args:
        paths: Folders or ``results.csv`` files of comparisons, whose runs are put together. Curves and pictures of
            features are drawn of runs in folders only.
        folder: Where the files are written. Default: the folder of the comparison if there is just one; else the
            table is only printed.

    Returns:
        A row for each run, as in ``results.csv``.

    Raises:
        InputError: If no run is finished, the ``config.yaml`` of one is damaged, or two are the same.
    """
    sources = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    runs = [run for source in sources for run in read(source)]
    if not runs:
        raise InputError(
            f"--report: no run in {', '.join(str(source.absolute()) for source in sources)} is finished; pass the "
            "folder or the results.csv of a compare."
        )
    names = setting_names(sorted(runs, key=lambda run: list(run.settings)))
    runs.sort(key=lambda run: _order(run, names))
    _check_unique(runs, names)
    table = _table(runs, names)
    if folder is None and len(sources) == 1 and sources[0].is_dir():
        folder = sources[0]
    rows = [run.row() for run in runs]
    if folder is None:
        print(table)
        return rows
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns = list({name: None for row in rows for name in row})
    write_csv(folder / "results.csv", [columns, *([row.get(name, "") for name in columns] for row in rows)])
    write_text(folder / "table.md", table)
    for name, figure in draw(runs):
        with atomic_path(folder / f"{file_name(name)}.png") as part:
            figure.savefig(part, format="png", dpi=100)
    print(f"{table}\nTable and figures are in {folder}")
    return rows


def _order(run: FinishedRun, names: Sequence[str]) -> tuple[Any, ...]:
    """Sort by settings, first those with fewer of them, numbers by size; then by margin and seed."""
    values = [run.value(name) for name in names]
    numbers = [value if is_number(value) else math.inf for value in values]
    missing = [value == "-" for value in values]
    return sum(not absent for absent in missing), missing, numbers, list(map(str, values)), run.margin, run.pair


def _check_unique(runs: Sequence[FinishedRun], names: Sequence[str]) -> None:
    """Reject two runs that only settings tell apart which the rows do not contain."""
    seen: dict[Any, FinishedRun] = {}
    for run in runs:
        other = seen.setdefault((run.group(names), run.margin, run.pair), run)
        if other is not run:
            raise InputError(
                f"--report: two runs have margin {run.margin}, seed {run.seed} and the same settings; report their "
                f"comparisons separately. Their commands: {other.facts.get('command')}; {run.facts.get('command')}."
            )


def _table(runs: Sequence[FinishedRun], names: Sequence[str]) -> str:
    found = {name for run in runs for name in run.metrics}
    known = {name for name, *_ in _COLUMNS}
    columns = [(name, name, 1, 3) for name in sorted(found) if name.startswith("val/") and name not in known]
    columns += [column for column in _COLUMNS if column[0] in found]
    has_paper = any("paper" in run.facts for run in runs)

    header = ["m", *names, "runs", "test accuracy, %", "difference to m = 1 (95 % interval)"]
    header += [title for _, title, *_ in columns] + ["paper, %"] * has_paper
    lines = []
    for group, margin in dict.fromkeys((run.group(names), run.margin) for run in runs):
        same_settings = [run for run in runs if run.group(names) == group]
        group_runs = [run for run in same_settings if run.margin == margin]
        paper = PAPER_ACCURACIES.get(group_runs[0].facts.get("paper", ""), {})
        lines.append(
            [
                str(margin),
                *group,
                str(len(group_runs)),
                _mean(group_runs, "test/acc", 100, 2),
                _difference(group_runs, [run for run in same_settings if run.margin == 1]),
                *(_mean(group_runs, name, factor, digits) for name, _, factor, digits in columns),
                *[paper.get(margin, "-")] * has_paper,
            ]
        )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
    return "\n\n".join([table, *_notes(runs)]) + "\n"


def _notes(runs: Sequence[FinishedRun]) -> list[str]:
    """Say what the numbers of a table are, and what they were measured on."""

    def values(name: str, missing: str = "not set") -> str:
        """Join the distinct values of a fact."""
        found = [run.facts.get(name, missing) for run in runs]
        return " / ".join(dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in found))

    names = {name: None for run in runs for name in run.facts}
    data = [f"{name} {values(name)}" for name in ("batch_size", "train_size", "label_noise") if name in names]
    packages = [f"{name} {values(name)}" for name in ("python", *PACKAGES) if name in names]
    averaged = "".join(f" and {name}" for name in dict.fromkeys(name for run in runs for name in run.averaged))
    papers = dict.fromkeys(run.facts["paper"] for run in runs if "paper" in run.facts)
    commands = "\n".join(dict.fromkeys(run.facts["command"] for run in runs))
    return [
        f"Tested checkpoint: {values('checkpoint')}. Mean ± standard deviation of the runs, angles in degrees. "
        f"Differences are paired by seed{averaged}, in percentage points, with the 95 % interval of Student's t.",
        f"{values('data')}, {values('steps', '?')} steps, {', '.join(data)}, on {values('machine', '?')} "
        f"(threads of a run: {values('threads', '?')}); {', '.join(packages)}.",
        *map(paper_source, papers),
        f"```sh\n{commands}\n```",
    ]


def _mean(runs: Sequence[FinishedRun], name: str, factor: float, digits: int) -> str:
    """Format the mean and the standard deviation of a metric."""
    values = [factor * run.metrics[name] for run in runs if name in run.metrics]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _difference(runs: Sequence[FinishedRun], softmax: Sequence[FinishedRun]) -> str:
    """Format the mean difference of the test accuracy to paired runs at m = 1, in percentage points."""
    if runs[0].margin == 1:
        return "-"
    gaps = paired_differences(runs, softmax)
    return mean_and_interval(gaps) if gaps else "-"
