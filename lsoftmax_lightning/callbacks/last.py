"""The checkpoint that a run goes on from."""

from __future__ import annotations

import math
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``; a run that is told to stop (SIGINT of Ctrl-C, SIGTERM of schedulers) writes it first.

    It is written after each validation, or after each epoch where there is none, like any
    :class:`~lightning.pytorch.callbacks.ModelCheckpoint`. Told to stop, the run ends behind the next optimiser step,
    or the one after, and the validation that falls there, on all processes together, with the signal's exit code (130,
    143). A second signal ends it at once.

    Args:
        dirpath: Where; by default ``checkpoints`` in the folder of the run.

    Raises:
        SystemExit: When the run was told to stop.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        super().__init__(dirpath, filename="last", enable_version_counter=False)
        self._signal: signal.Signals | None = None
        self._owed = False  # whether a validation left the checkpoint to the end of the step
        self._leaving = False  # whether this is the checkpoint of a run that was told to stop

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listens, in the place of Lightning, which puts things back when the Trainer is done."""
        super().on_train_start(trainer, pl_module)
        self._signal, self._leaving = None, False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._signal = signal.Signals(number)
        signal.signal(number, signal.default_int_handler)
        print(f"\n{self._signal.name}: stopping after this step; once more to stop at once.", file=sys.stderr)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Ends a run that was told to stop: only now all of the step, or epoch, before is logged."""
        if self._leaving:
            self._end(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves what a validation left to be saved, or where the run is told to stop.

        Not before a validation or the end of an epoch, which a run that goes on from here would leave out.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        every = trainer.val_check_batch or math.inf
        validates = not (batch_idx + 1) % every or not (trainer.fit_loop.total_batch_idx + 1) % every
        ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        if validates or ends or _amid_a_step(trainer):
            return
        told = self._told(trainer)
        if told or self._owed:
            trainer.save_checkpoint(self.format_checkpoint_name({}), weights_only=False)
            self._owed, self._leaving = False, told

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves, unless gradients are being accumulated, which no checkpoint has."""
        self._owed = trainer.state.fn == "fit" and not trainer.sanity_checking and _amid_a_step(trainer)
        if self._owed:
            return
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and self._last_global_step_saved == trainer.global_step:
            self._leaving = self._told(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Ends a run that was told to stop in its last step: no test follows."""
        super().on_train_end(trainer, pl_module)
        if self._told(trainer):
            self._end(trainer)

    def _told(self, trainer: Trainer) -> bool:
        """Whether any process was told to stop: the same answer on all of them."""
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _end(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            raise SystemExit(0)  # one code of a run; with another Lightning would kill the first process
        print(
            f"Stopped after {trainer.global_step} steps; all is in {self.format_checkpoint_name({})}, from which "
            "--ckpt_path goes on.",
            file=sys.stderr,
        )
        raise SystemExit(128 + (self._signal or signal.SIGTERM))


def _amid_a_step(trainer: Trainer) -> bool:
    """Whether more batches are to come before the optimiser moves."""
    return not trainer.is_last_batch and bool((trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches)
