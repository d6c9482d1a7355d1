"""The last checkpoint, from which a run continues."""

from __future__ import annotations

import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from typing_extensions import override

from ..checkpoints import update_index
from ..compat import CheckpointHooks
from ..signals import SignalHandler, Stopped

_CHECK_SECONDS = 1.0  # between two collective checks for a signal


class LastCheckpoint(CheckpointHooks):
    """Keep ``last.ckpt``, and save it before SIGINT (Ctrl-C) or SIGTERM (schedulers) stops the training.

    The checkpoint is saved after each validation and at the end of each epoch. After a signal, the run ends with the
    exit code of the signal (130, 143). A run on one rank ends after the optimiser step, and after a validation or epoch
    that ends with it. Several ranks end about a second later, because they check once a second whether one of them
    received a signal. A second signal ends the run at once.

    Place it after a callback that keeps the best checkpoint, because Lightning's ``ckpt_path="best"`` takes the
    checkpoint of the first one.

    Args:
        dirpath: Folder of the checkpoint. Default: ``checkpoints`` in the folder of the run.

    Raises:
        SystemExit: After a signal.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        super().__init__(dirpath, filename="last", enable_version_counter=False)
        self._handler = SignalHandler(_announce)
        self._save_pending = False  # whether a validation deferred the checkpoint to the end of the optimiser step
        self._exit_after_save = False
        self._next_check = 0  # step of the next collective check for a signal
        self._last_check = (0, 0.0)  # step and time

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the signal handlers of Lightning, which restores the previous ones after the training."""
        super().on_train_start(trainer, pl_module)
        self._handler, self._exit_after_save = SignalHandler(_announce), False
        self._next_check, self._last_check = 0, (trainer.global_step, time.monotonic())
        self._handler.install()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End a stopped run here, where the previous step or epoch is logged."""
        if self._exit_after_save:
            self._exit(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a deferred checkpoint, or the checkpoint of a run that stops.

        Nothing is saved before a validation or the end of an epoch, because a resumed run would skip them.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        every = trainer.val_check_batch or math.inf
        validates = not (batch_idx + 1) % every or not (trainer.fit_loop.total_batch_idx + 1) % every
        ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        if validates or ends or _is_accumulating(trainer):
            return
        stop = trainer.global_step >= self._next_check and self._stop_requested(trainer)
        if stop or self._save_pending:
            self.write_checkpoint(trainer, self.format_checkpoint_name({}))
            self._save_pending, self._exit_after_save = False, stop

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless gradients are being accumulated, which a checkpoint does not contain."""
        self._save_pending = trainer.state.fn == "fit" and not trainer.sanity_checking and _is_accumulating(trainer)
        if self._save_pending:
            return
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and self.is_written(trainer):
            self._exit_after_save = self._stop_requested(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, even if Lightning saves only after validations, because the run may end with this epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self.skips_writing(trainer):
            self.write_checkpoint(trainer, self.format_checkpoint_name({}))
        if trainer.global_step >= self._next_check:
            self._exit_after_save |= self._stop_requested(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a run that was stopped in its last step, so that no test follows."""
        super().on_train_end(trainer, pl_module)
        if self._stop_requested(trainer):
            self._exit(trainer)

    @override
    def after_write(self, trainer: Trainer, filepath: str) -> None:
        if trainer.is_global_zero and "://" not in filepath:
            update_index(Path(filepath).parent, last=Path(filepath).name)

    def _stop_requested(self, trainer: Trainer) -> bool:
        """Return whether any rank received a signal; the result is the same on all ranks."""
        stop = self._handler.received is not None
        if trainer.world_size == 1:
            return stop
        (step, since), now = self._last_check, time.monotonic()
        self._last_check = trainer.global_step, now
        steps = max(1, int((trainer.global_step - step) / max(now - since, 1e-9) * _CHECK_SECONDS))
        request = torch.tensor([stop, -steps], device=trainer.strategy.root_device)
        any_stop, negative_steps = trainer.strategy.reduce(request, reduce_op="max").tolist()
        self._next_check = trainer.global_step - negative_steps  # the fewest steps of a rank
        return bool(any_stop)

    def _exit(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            raise SystemExit(0)  # with another code, Lightning would kill rank 0
        path = self.format_checkpoint_name({})
        print(f"Stopped after {trainer.global_step} steps; continue from {path} with --ckpt_path.", file=sys.stderr)
        raise Stopped(self._handler.received or signal.SIGTERM)


def _announce(signum: signal.Signals) -> None:
    print(f"\n{signum.name}: stopping after this step; send it again to stop at once.", file=sys.stderr)


def _is_accumulating(trainer: Trainer) -> bool:
    """Return whether more batches follow before the optimiser step."""
    return not trainer.is_last_batch and bool((trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches)
