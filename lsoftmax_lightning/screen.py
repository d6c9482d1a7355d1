"""What the commands print: metrics as a table, and log messages of Lightning without those of no use."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from rich import box, get_console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .library_messages import UNNEEDED_MESSAGES

_PERCENT, _DEGREES, _PLAIN = "%", "°", ""
_METRICS = {  # by the name without its stage: label and unit
    "Accuracy and loss": {
        "acc": ("accuracy", _PERCENT),
        "acc_stderr": ("accuracy, standard error of the folds", _PERCENT),
        "margin_acc": ("accuracy with the margin", _PERCENT),
        "loss": ("cross-entropy without the margin", _PLAIN),
        "margin_loss": ("loss with the margin", _PLAIN),
        "auc": ("area under the ROC curve", _PLAIN),
        "eer": ("equal error rate", _PERCENT),
        "tar_at_far_1e-2": ("same pairs accepted, at 1 % false accepts", _PERCENT),
        "tar_at_far_1e-3": ("same pairs accepted, at 0.1 % false accepts", _PERCENT),
    },
    "Compactness": {
        "angle": ("mean angle of a sample to its class weight", _DEGREES),
        "feature_norm": ("mean norm of a feature", _PLAIN),
    },
    "Separation": {
        **{
            f"{subject}_angle_{statistic}": (f"angle between {name}, {description}", _DEGREES)
            for subject, name in (("centre", "class centres"), ("weight", "class weights"))
            for statistic, description in (
                ("nearest", "nearest class"),
                ("mean", "mean"),
                ("min", "smallest"),
            )
        },
    },
}


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Leave out the log messages of Lightning in ``UNNEEDED_MESSAGES`` during the block."""

    def is_needed(record: logging.LogRecord) -> bool:
        return not re.match(UNNEEDED_MESSAGES, record.getMessage())

    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("lightning")]
    for logger in loggers:
        logger.addFilter(is_needed)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_needed)


def metrics_table(metrics: Mapping[str, float | Tensor], title: str) -> Table:
    """Return a table of metrics by group, rounded and with their units.

    Args:
        metrics: By name, such as ``test/acc``. Fractions of samples in a segment of psi are left out.
        title: Title of the table.
    """
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rest = {name.partition("/")[2] or name: value for name, value in metrics.items() if "/segment_" not in name}
    for group, known in _METRICS.items():
        rows = [(label, _rounded(rest.pop(name), unit)) for name, (label, unit) in known.items() if name in rest]
        _add_group(table, group, rows)
    _add_group(table, "Other metrics", [(name, _rounded(value, _PLAIN)) for name, value in rest.items()])
    return table


def _add_group(table: Table, title: str, rows: Sequence[tuple[str, str]]) -> None:
    if rows:
        table.add_row(f"[bold]{title}")
    for label, value in rows:
        table.add_row(f"  {escape(label)}", value)


def _rounded(value: float | Tensor, unit: str) -> str:
    if unit == _PERCENT:
        return f"{100 * float(value):.2f} %"
    return f"{float(value):.1f}°" if unit == _DEGREES else f"{float(value):.4g}"


@rank_zero_only
def print_metrics(metrics: Mapping[str, float | Tensor], title: str) -> None:
    """Print :func:`metrics_table`, on rank 0."""
    get_console().print(metrics_table(metrics, title))
