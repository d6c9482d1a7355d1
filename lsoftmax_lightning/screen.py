"""Terminal output: tables of metrics, and a filter for log messages of Lightning."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from rich import box, get_console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .library_messages import UNNEEDED_MESSAGES
from .metric_labels import labelled
from .user_errors import LIBRARIES


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    place = "" if filename.startswith(LIBRARIES) else f"{filename}:{lineno}: "
    return f"warning: {place}{message}\n"


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Suppress Lightning's log messages that match ``UNNEEDED_MESSAGES``, and the location of library warnings."""

    def is_needed(record: logging.LogRecord) -> bool:
        return not re.match(UNNEEDED_MESSAGES, record.getMessage())

    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("lightning")]
    for logger in loggers:
        logger.addFilter(is_needed)
    format_before, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        for logger in loggers:
            logger.removeFilter(is_needed)


def metrics_table(metrics: Mapping[str, float | Tensor], title: str) -> Table:
    """Return a table of metrics for a terminal; see :func:`~lsoftmax_lightning.metric_labels.labelled`."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for group, rows in labelled(metrics).items():
        table.add_row(f"[bold]{group}")
        for label, value in rows:
            table.add_row(f"  {escape(label)}", value)
    return table


@rank_zero_only
def print_metrics(metrics: Mapping[str, float | Tensor], title: str) -> None:
    """Print the :func:`metrics_table` on rank 0."""
    get_console().print(metrics_table(metrics, title))
