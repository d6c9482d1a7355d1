"""Process of one run of a comparison: ``python -m lsoftmax_lightning.compare.worker FOLDER PID``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from typing_extensions import override

from ..atomic import write_text
from ..callbacks.run_length import run_length
from ..dashboard.record import TestRecord
from ..lightning_cli import LSoftmaxCLI
from ..signals import Stopped
from ..user_errors import errors_without_traceback


class ProgressFile(Callback):
    """Write the progress of the run to a file every second, and end the run if the comparison has ended.

    Args:
        path: File for the numbers of optimiser steps done and in total.
        parent: Process ID of the comparison.
    """

    def __init__(self, path: Path, parent: int) -> None:
        self.path = path
        self._parent = parent
        self._next_time = 0.0

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self._next_time:
            self._next_time = time.monotonic() + 1
            self._write(trainer)
            self._check_parent(trainer)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._check_parent(trainer)

    @override
    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._check_parent(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._write(trainer)

    def _check_parent(self, trainer: Trainer) -> None:
        """End the run if the process of the comparison has ended."""
        if trainer.is_global_zero and os.getppid() != self._parent:
            raise Stopped(signal.SIGTERM)

    def _write(self, trainer: Trainer) -> None:
        total_steps = run_length(trainer)  # on every rank, since it may use collectives
        if trainer.is_global_zero:
            write_text(self.path, f"{trainer.global_step} {total_steps}")


def main(folder: str, parent: int) -> None:
    """Train and test the config in a folder, resuming from its last checkpoint if there is one.

    Args:
        folder: Folder of the run.
        parent: Process ID of the comparison.
    """
    last = Path(folder, "checkpoints", "last.ckpt")
    resume = [f"--ckpt_path={last}"] if last.is_file() else []
    callbacks = [ProgressFile(Path(folder, "progress"), parent), TestRecord(Path(folder, "test.pt"))]
    with errors_without_traceback():
        LSoftmaxCLI(["fit", f"--config={folder}/config.yaml", *resume], callbacks=callbacks)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
