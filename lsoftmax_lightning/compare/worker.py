"""One run of a comparison, in a process of its own: ``python -m lsoftmax_lightning.compare.worker FOLDER PID``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from ..atomic import write_text
from ..callbacks.run_length import run_length
from ..dashboard.record import TestRecord
from ..lightning_cli import LSoftmaxCLI
from ..signals import Stopped
from ..user_errors import errors_without_traceback


class Progress(Callback):
    """Tells the comparison how far the run is, every second, and ends the run when there is nobody left to be told.

    Args:
        path: Of a file for the optimiser steps done, and those of the whole run.
        parent: Process of the comparison.
    """

    def __init__(self, path: Path, parent: int) -> None:
        self.path = path
        self._parent = parent
        self._next = 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Tells."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 1
            self._tell(trainer)
            self.on_validation_batch_end(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Ends the run, if the comparison has ended."""
        if trainer.is_global_zero and os.getppid() != self._parent:
            raise Stopped(signal.SIGTERM)

    on_test_batch_end = on_validation_batch_end

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Tells, for the last time."""
        self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        total = run_length(trainer)  # to be asked on every process
        if trainer.is_global_zero:
            write_text(self.path, f"{trainer.global_step} {total}")


def main(folder: str, parent: int) -> None:
    """Trains and tests the config of a folder, from the last checkpoint in it if there is one.

    Args:
        folder: Of the run.
        parent: Process of the comparison.
    """
    last = Path(folder, "checkpoints", "last.ckpt")
    resume = [f"--ckpt_path={last}"] if last.is_file() else []
    own = [Progress(Path(folder, "progress"), parent), TestRecord(Path(folder, "test.pt"))]
    with errors_without_traceback():
        LSoftmaxCLI(["fit", f"--config={folder}/config.yaml", *resume], callbacks=own)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
