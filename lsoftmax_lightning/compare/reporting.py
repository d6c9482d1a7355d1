"""Report of finished runs: table and figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box, get_console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ..atomic import atomic_path, write_csv, write_text
from ..dashboard import plots
from ..errors import InputError
from ..html_page import Section, figure_html, table_html, text_html, write_page
from ..provenance import PACKAGES
from .figures import draw
from .intervals import mean_and_interval, paired_differences, standard_deviation
from .paper import paper_accuracy, paper_source
from .results import TRAINING_FACTS, FinishedRun, as_float, column_name, columns, read, setting_names
from .text import file_name, markdown_table

_LONGEST_NAME = 150  # characters of the name of a figure
_MARGINS_PER_TABLE = 4  # columns of a table on a narrow terminal
# metric, title, factor and decimals; a metric that no run has is left out
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


def report(
    paths: str | Path | Sequence[str | Path],
    folder: str | Path | None = None,
    average: Collection[str] = (),
    html: bool = False,
) -> list[dict[str, Any]]:
    """Print the table of finished runs, and write it with ``results.csv`` and figures, without training.

    A terminal shows a formatted table; otherwise the Markdown of ``table.md`` is printed. In ``results.csv``, a ``'``
    precedes texts that a spreadsheet would evaluate as a formula.

    If the commands of compared runs differ in settings that are not columns of the table, a note lists them.

    Args:
        paths: Folders or ``results.csv`` files of comparisons, whose runs are combined. Curves and feature plots are
            drawn only for runs in folders.
        folder: Folder for the files. Default: the folder of the comparison if it is the only path; otherwise nothing is
            written.
        average: Settings to average over, in addition to those that the runs were trained with.
        html: Whether to also write table, figures and notes as one page, ``report.html``.

    Returns:
        A row for each run, as in ``results.csv``.

    Raises:
        InputError: If a path has no finished run, the ``config.yaml`` of a run is damaged, a run lacks a setting to
            average over, or runs with the same margin and seed cannot be distinguished or compared.
    """
    sources = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    found = {source: list(read(source)) for source in sources}
    for source, runs in found.items():
        if not runs:
            raise InputError(
                f"--report: no run in {source.absolute()} is finished; pass the folder or the results.csv of a compare."
            )
    runs = _with_averages([run for runs in found.values() for run in runs], average)
    names = setting_names(runs)
    runs.sort(key=lambda run: _order(run, names))
    _check_comparable(runs, names)
    header, lines = _table(runs, names)
    notes = _notes(runs, names)
    rows = [run.row() for run in runs]
    if folder is None and len(sources) == 1 and sources[0].is_dir():
        folder = sources[0]
    if folder is None and html:
        raise InputError("html: needs a folder for the page, got none; set --folder.")
    if folder is not None:
        _write(Path(folder), runs, rows, header, lines, notes, html)
    if get_console().is_terminal:
        _print_table(header, lines, notes)
    else:
        print(_markdown(header, lines, notes))
    if folder is not None:
        print(f"\nTable and plots are in {folder}")
    return rows


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    return "\n\n".join([markdown_table(header, lines), *notes])


def _print_table(header: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Print a table on a terminal; if it is too wide, transposed tables with a column for each of four margins."""
    console = get_console()
    table = Table(*map(escape, header), box=box.SIMPLE_HEAD)
    for line in lines:
        table.add_row(*map(escape, line))
    if table.__rich_measure__(console, console.options).maximum <= console.width:
        console.print(table)
    else:
        for start in range(0, len(lines), _MARGINS_PER_TABLE):
            shown = lines[start : start + _MARGINS_PER_TABLE]
            table = Table("", *(f"m = {line[0]}" for line in shown), box=box.SIMPLE_HEAD)
            for name, *cells in list(zip(header, *shown, strict=True))[1:]:
                table.add_row(escape(name), *map(escape, cells))
            console.print(table)
    console.print("\n\n".join(map(escape, notes[:-1])))


def _write(
    folder: Path,
    runs: Sequence[FinishedRun],
    rows: Sequence[Mapping[str, Any]],
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    notes: Sequence[str],
    html: bool,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = columns(runs)
    write_csv(folder / "results.csv", [names, *([row.get(name, "") for name in names] for row in rows)])
    write_text(folder / "table.md", _markdown(header, lines, notes) + "\n")
    written: set[str] = set()
    html_figures = []
    for title, figure in track(draw(runs), "Drawing", transient=True, disable=not get_console().is_terminal):
        name = file_name(title)[:_LONGEST_NAME]
        if name in written:
            name += f"-{len(written)}"
        written.add(name)
        with atomic_path(folder / f"{name}.png") as part:
            figure.savefig(part, format="png", dpi=plots.DPI)
        if html:
            html_figures.append(figure_html(figure, name))
    if html:
        sections = [Section("Accuracy", table_html(header, lines)), Section("Plots", "\n".join(html_figures))]
        sections.append(Section("How it was measured", text_html("\n\n".join(notes))))
        write_page(folder / "report.html", f"Comparison {folder.name}", sections)


def _with_averages(runs: Sequence[FinishedRun], average: Collection[str]) -> list[FinishedRun]:
    """Mark every setting that some run averages over, or ``average`` names, as averaged in all runs."""
    names = [*map(column_name, average), *(name for run in runs for name in run.averaged)]
    averaged = list(dict.fromkeys(names))
    for run in runs:
        if missing := [name for name in averaged if name not in {*run.settings, *TRAINING_FACTS}]:
            raise InputError(
                f"--average: needs {missing[0]} in every run, got one with margin {run.margin} and seed {run.seed} "
                "without it; report that comparison separately."
            )
    if not averaged:
        return list(runs)
    return [replace(run, facts={**run.facts, "averaged": ", ".join(averaged)}) for run in runs]


def _order(run: FinishedRun, names: Sequence[str]) -> tuple[Any, ...]:
    """Return the sort key: settings, fewer ones first and numbers by value; then margin and seed."""
    values = [run.value(name) for name in names]
    missing = [value == "-" for value in values]
    sizes = [math.inf if (size := as_float(value)) is None else size for value in values]
    averaged = [as_float(run.value(name)) or 0.0 for name in run.averaged]
    return missing.count(False), missing, sizes, list(map(str, values)), run.margin, run.seed, averaged, run.pairing_key


def _check_comparable(runs: Sequence[FinishedRun], names: Sequence[str]) -> None:
    """Reject runs that cannot be compared."""
    first: dict[Any, FinishedRun] = {}
    seen: dict[Any, FinishedRun] = {}
    for run in runs:
        group = run.group_key(names)
        other = first.setdefault(group, run)
        facts = {name: run.group_key([name]) != other.group_key([name]) for name in ("backbone", "batch_size", "paper")}
        explained = {"paper", *(name.rpartition(".")[2] for name in run.averaged)} if run.averaged else set()
        differing = [name for name, differs in facts.items() if differs and name not in explained]
        if not differing and (same := seen.setdefault((group, run.margin, run.pairing_key), run)) is not run:
            if same.value("command") == run.value("command"):
                raise InputError(
                    f"--report: got the run with margin {run.margin} and seed {run.seed} twice; leave out the copy."
                )
            other, differing = same, ["command"]
        if differing:
            name = differing[0]
            raise InputError(
                f"--report: two runs differ in {name}, which is not a column of the table, got {other.value(name)} and "
                f"{run.value(name)}; report their comparisons separately."
            )


def _table(runs: Sequence[FinishedRun], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table."""
    found = {name for run in runs for name in run.metrics}
    known = {name for name, *_ in _COLUMNS}
    monitors = sorted({str(run.value("checkpoint")).partition(" of ")[2] for run in runs} & found - known)
    shown = [(name, name, 1, 3) for name in monitors]
    shown += [column for column in _COLUMNS if column[0] in found]
    header = ["m", *names, "runs", "test accuracy, %", "difference to m = 1 (95 % interval)"]
    header += [title for _, title, *_ in shown]
    has_paper = any("paper" in run.facts for run in runs)
    if has_paper:
        header.append("paper, %")
    lines = []
    for group, margin in dict.fromkeys((run.group_key(names), run.margin) for run in runs):
        same_settings = [run for run in runs if run.group_key(names) == group]
        group_runs = [run for run in same_settings if run.margin == margin]
        line = [str(margin), *group, str(len(group_runs)), _mean(group_runs, "test/acc", 100, 2)]
        line.append(_difference(group_runs, [run for run in same_settings if run.margin == 1]))
        line += [_mean(group_runs, name, factor, digits) for name, _, factor, digits in shown]
        if has_paper:
            papers = {run.facts.get("paper") for run in group_runs}  # several if the table averages over the data
            line.append(paper_accuracy(papers.pop() if len(papers) == 1 else None, margin))
        lines.append(line)
    return header, lines


def _differences(runs: Sequence[FinishedRun], names: Sequence[str]) -> str:
    """Return settings and values in which the commands of runs differ that have the same values in the table."""
    known = {*names, *(name for run in runs for name in run.averaged)}
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for run in runs:
        groups.setdefault(run.group_key(names), []).append(run.command_settings)
    differing: dict[str, dict[str, None]] = {}
    for group in groups.values():
        for name in {name: None for settings in group for name in settings if column_name(name) not in known}:
            values = dict.fromkeys(settings.get(name, "not set") for settings in group)
            if len(values) > 1:
                differing.setdefault(name, {}).update(values)
    return ", ".join(f"{name} ({' / '.join(values)})" for name, values in differing.items())


def _notes(runs: Sequence[FinishedRun], compared: Sequence[str]) -> list[str]:
    """Return the paragraphs below the table: the meaning of its numbers, data, machine, versions and commands."""

    def values(name: str, missing: str = "not set") -> str:
        """Join the distinct values of a fact."""
        found = [run.facts.get(name, missing) for run in runs]
        return " / ".join(dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in found))

    names = {name: None for run in runs for name in run.facts}
    data = [f"{name} {values(name)}" for name in ("batch_size", "train_size", "label_noise") if name in names]
    packages = [f"{name} {values(name)}" for name in ("python", *PACKAGES) if name in names]
    averaged = "".join(f" and {name}" for name in dict.fromkeys(name for run in runs for name in run.averaged))
    papers = dict.fromkeys(run.facts["paper"] for run in runs if "paper" in run.facts)
    commands = "\n".join(dict.fromkeys(str(run.facts.get("command", "?")) for run in runs))
    seeds = {run.seed for run in runs}
    alone = f" There is one seed, {seeds.pop()}." if len(seeds) == 1 else ""
    differences = _differences(runs, compared)
    return [
        *([f"The commands of runs that are compared here differ in {differences}."] if differences else []),
        f"Tested checkpoint: {values('checkpoint')}. Mean ± standard deviation of the runs, angles in degrees. "
        f"Differences are paired by seed{averaged}, in percentage points, with the 95 % interval of Student's t."
        f"{alone}",
        f"{', '.join([values('data'), values('steps', '?') + ' steps', *data])}, on {values('machine', '?')} "
        f"(threads of a run: {values('threads', '?')}); {', '.join(packages)}.",
        *map(paper_source, papers),
        f"```sh\n{commands}\n```",
    ]


def _mean(runs: Sequence[FinishedRun], name: str, factor: float, digits: int) -> str:
    """Format the mean and the standard deviation of a metric."""
    values = [factor * run.metrics[name] for run in runs if name in run.metrics]
    if not values:
        return "-"
    spread = f" ± {standard_deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _difference(runs: Sequence[FinishedRun], softmax: Sequence[FinishedRun]) -> str:
    """Format the mean difference of the test accuracy to paired runs at m = 1, in percentage points."""
    if runs[0].margin == 1:
        return "-"
    gaps = paired_differences(runs, softmax)
    return mean_and_interval(gaps) if gaps else "-"
