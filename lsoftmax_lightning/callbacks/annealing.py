"""Annealing of lambda, and the alarm for a loss that diverges because of it."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from ..errors import DivergenceError, InputError
from ..schedules import LambdaSchedule

_NEVER = torch.iinfo(torch.int64).max


class LambdaAnnealing(Callback):
    """Sets lambda of the module's head before each training batch; shows it and logs it as ``lambda``.

    lambda is a function of the Trainer's optimiser steps, so gradient accumulation does not speed it up and a resumed
    run goes on where it stopped. The annealing is that of the paper, section 4.

    A loss that is NaN or infinite stops the run before another checkpoint is written. It is looked for on the device
    and read every ``log_every_n_steps`` steps, before a validation or a checkpoint and at the end of an epoch, so that
    it costs no wait per step.

    Args:
        schedule: lambda as a function of the step; by default the module's own ``lambda_schedule``.

    Raises:
        InputError: At the start of ``fit``, if the module offers no head, or nobody a schedule.
        DivergenceError: When the training loss is not finite.
    """

    def __init__(self, schedule: LambdaSchedule | None = None) -> None:
        self.schedule = schedule
        self._first_bad_step: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Forgets the loss of an earlier call."""
        self._first_bad_step = None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Checks what is needed, before any work."""
        name = type(pl_module).__name__
        if not hasattr(getattr(pl_module, "head", None), "lambda_"):
            raise InputError(f"LambdaAnnealing needs an LSoftmaxLinear as `self.head` of {name}.")
        if not callable(self.schedule or getattr(pl_module, "lambda_schedule", None)):
            raise InputError(f"LambdaAnnealing needs a schedule, as its argument or as {name}.lambda_schedule.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: object, batch_idx: int) -> None:
        """Sets lambda."""
        pl_module.head.lambda_ = self._lambda_at(trainer, pl_module, trainer.global_step)

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Notes the first step whose loss is not finite, without waiting for the device."""
        if self._first_bad_step is None:
            self._first_bad_step = torch.full((), _NEVER, device=loss.device)
        step = torch.where(loss.detach().isfinite(), _NEVER, trainer.global_step)
        self._first_bad_step = torch.minimum(self._first_bad_step, step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Logs lambda and stops a diverged run, every ``log_every_n_steps`` steps and at the end of an epoch.

        Not in ``on_train_epoch_end``: there Lightning's progress bar makes the first process wait for the others.
        """
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.is_last_batch or trainer.should_stop or (every and trainer.global_step % every == 0):
            pl_module.log("lambda", pl_module.head.lambda_, prog_bar=True)  # no more often: it costs half a millisecond
            self._stop_if_diverged(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stops a diverged run before a validation can choose it."""
        self._stop_if_diverged(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Stops a diverged run before it overwrites a good checkpoint."""
        self._stop_if_diverged(trainer, pl_module)

    def _lambda_at(self, trainer: Trainer, pl_module: Any, step: int) -> float:
        schedule = self.schedule or pl_module.lambda_schedule
        lambda_: float = schedule(step, trainer.estimated_stepping_batches)
        return lambda_

    def _stop_if_diverged(self, trainer: Trainer, pl_module: Any) -> None:
        if self._first_bad_step is None:
            return
        # the same answer on every process, or the others would wait for the one that stopped
        step = int(trainer.strategy.reduce(self._first_bad_step, reduce_op="min"))
        if step == _NEVER:
            return
        paths = [
            getattr(callback, kind, "")
            for kind in ("best_model_path", "last_model_path")
            for callback in trainer.checkpoint_callbacks
        ]
        kept = next(filter(os.path.exists, paths), "none was saved yet")
        raise DivergenceError(
            f"The training loss was NaN or infinite at optimiser step {step}, where lambda was "
            f"{self._lambda_at(trainer, pl_module, step):.4g} (margin {pl_module.head.margin}). Try slower annealing "
            "(a larger `fraction`, or a smaller `gamma`), a `lambda_min` above 0, or a lower learning rate. "
            f"Last good checkpoint: {kept}."
        )
