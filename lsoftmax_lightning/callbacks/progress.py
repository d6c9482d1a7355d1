"""The progress bar of the command line."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich import get_console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from typing_extensions import override

from .run_length import run_length

REFRESH_SECONDS = 0.1


class RunProgress(ProgressBar):
    """One line on a terminal: optimizer steps of the whole run, time left, and the latest metrics.

    The line stays when training ends. Evaluation and prediction count batches, and their line disappears at the end.
    In a notebook the line needs ipywidgets. Nothing is shown where the output is neither a terminal nor a notebook.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._progress: Progress | None = None  # while something runs
        self._task = TaskID(0)
        self._next_update = 0.0  # seconds of the clock

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show the line of the next run."""
        self._enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("Training", run_length(trainer), "steps", completed=trainer.global_step)

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._progress is not None and time.monotonic() >= self._next_update:
            self._update(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update(trainer)
        self._stop()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._update(trainer, "Validating")
        else:
            self._start_batches("Validating", trainer.num_val_batches)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._update(trainer, "Training")
        else:
            self._stop()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_batches("Testing", trainer.num_test_batches)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_batches("Predicting", trainer.num_predict_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        if self._progress is not None:
            self._progress.advance(self._task)

    on_predict_batch_end = on_test_batch_end

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Count a batch, unless the validation is part of training."""
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_test_batch_end(trainer)

    def on_test_end(self, *args: Any, **kwargs: Any) -> None:
        """Remove the line."""
        self._stop()

    on_predict_end = teardown = on_exception = on_test_end

    def _start(self, description: str, total: float, unit: str, completed: int = 0) -> None:
        console = get_console()
        is_terminal = console.is_terminal and console.file.isatty()  # with FORCE_COLOR rich takes a pipe for a terminal
        is_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
        if not self._enabled or not (is_terminal or is_notebook):
            return
        is_known = 0 < total < math.inf
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20, complete_style="cyan", finished_style="green"),
            TextColumn(f"{{task.completed}}/{total:.0f} {unit}" if is_known else f"{{task.completed}} {unit}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        )
        self._progress = Progress(
            *columns,
            console=console,
            transient=unit == "batches",
            expand=True,
            speed_estimate_period=300,
            refresh_per_second=4,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            description, total=total if is_known else None, completed=completed, left="left", metrics=""
        )

    def _start_batches(self, description: str, counts: Sequence[float]) -> None:
        self._start(description, sum(counts), "batches")

    def _update(self, trainer: Trainer, description: str | None = None) -> None:
        """Show the step and the metrics, at most every ``REFRESH_SECONDS`` during an epoch."""
        if self._progress is None:
            return
        self._next_update = time.monotonic() + REFRESH_SECONDS
        values = trainer.progress_bar_metrics
        names = sorted(values, key=lambda name: (not name.startswith("val/"), not name.startswith("train/")))
        self._progress.update(
            self._task,
            completed=trainer.global_step,
            description=description,
            metrics=" ".join(f"{name} {values[name]:.3g}" for name in names if isinstance(values[name], float)),
        )

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.update(self._task, left="")
            self._progress.stop()
            self._progress = None
