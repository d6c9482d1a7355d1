"""Annealing of lambda, and detection of a diverged loss."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from ..errors import DivergenceError, InputError
from ..heads import LSoftmaxLinear
from ..schedules import AccuracyFeedback, LambdaSchedule
from .run_length import run_length
from .running_accuracy import RunningAccuracy

_NEVER = torch.iinfo(torch.int64).max
_MAX_STEPS = 1000
"""Steps between two checks of the loss if the Trainer logs nothing."""


class LambdaAnnealing(Callback):
    """Set lambda of the module's head before each training batch and log it as ``lambda``.

    Works with any LightningModule whose ``head`` is an :class:`~lsoftmax_lightning.LSoftmaxLinear`. lambda changes once
    per optimiser step, so gradient accumulation does not speed it up, and a resumed run continues with the lambda
    of its step. With manual optimization, a schedule of steps needs one call of ``optimizer.step`` for each batch. The
    paper anneals lambda in section 4.

    A schedule with an ``accuracy_decay`` also gets the mean accuracy of the training logits. The mean is logged as
    ``train/margin_acc``, is the same on every rank, is saved in the checkpoint, and is read without waiting for the
    device. It requires a ``training_step`` that calls ``head(x, target)`` or ``head.cross_entropy(x, target)``.

    A NaN or infinite loss stops the run before another checkpoint is written. The losses are kept on the device and
    checked every ``log_every_n_steps`` steps, before a validation or checkpoint and at the end of an epoch and of the
    run, so that a step does not wait for the device.

    Args:
        schedule: Schedule of lambda. Default: the ``lambda_schedule`` of the module, or
            :class:`~lsoftmax_lightning.schedules.AccuracyFeedback` if the module has none.

    Raises:
        InputError: At the start of ``fit``, if the module has no head or its schedule is not callable. After ten
            steps, if the schedule needs the accuracy and the head was called without a target.
        DivergenceError: If the training loss is not finite.

    Example:
        >>> from lightning import Trainer
        >>> from lsoftmax_lightning.callbacks import LambdaAnnealing
        >>> trainer = Trainer(callbacks=[LambdaAnnealing()], logger=False)
    """

    def __init__(self, schedule: LambdaSchedule | None = None) -> None:
        self.schedule = schedule
        self._accuracy: RunningAccuracy | None = None
        self._module_id = 0  # id of the module whose accuracy is measured
        self._total_steps = math.inf
        self._losses: list[tuple[int, float, Tensor]] = []  # step, lambda and loss of each batch since the last check

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._losses.clear()
        if stage != "fit":
            return
        if trainer.global_step == 0 or id(pl_module) != self._module_id:
            self._accuracy, self._module_id = None, id(pl_module)
        decay = getattr(self.schedule_for(pl_module), "accuracy_decay", None)
        if decay is not None and self._accuracy is None:
            self._accuracy = RunningAccuracy(decay)
        if any(isinstance(callback, BatchSizeFinder | LearningRateFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self._check_module(pl_module)
            schedule: Callable[..., float] = self.schedule_for(pl_module)
            accuracy = () if self._accuracy is None else (0.0,)
            _head(pl_module).lambda_ = schedule(0, 1, *accuracy)  # tuners run their loops without callbacks

    def schedule_for(self, pl_module: LightningModule) -> LambdaSchedule:
        """Return the schedule that applies to a module."""
        schedule: LambdaSchedule = self.schedule or getattr(pl_module, "lambda_schedule", None) or AccuracyFeedback()
        return schedule

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the module and its schedule, and start measuring the accuracy if the schedule uses it."""
        self._check_module(pl_module)
        if self._accuracy is not None:
            self._accuracy.attach(_head(pl_module), pl_module.device)

    def _check_module(self, pl_module: LightningModule) -> None:
        name, head = type(pl_module).__name__, getattr(pl_module, "head", None)
        annealed = set(head.modules()) if isinstance(head, nn.Module) else ()
        others = [
            path for path, module in pl_module.named_modules() if hasattr(module, "lambda_") and module not in annealed
        ]
        if not hasattr(head, "lambda_"):
            advice = f"self.{others[0]} is one: rename it to head" if others else "assign one in __init__"
            raise InputError(
                f"head: LambdaAnnealing needs an LSoftmaxLinear as `self.head` of {name}, got {type(head).__name__}; "
                f"{advice}."
            )
        if others:
            rank_zero_warn(
                f"LambdaAnnealing anneals self.head of {name}, not self.{' and self.'.join(others)}: set "
                "their lambda_ before each step."
            )
        schedule = self.schedule_for(pl_module)
        if not callable(schedule) or isinstance(schedule, type):
            raise InputError(
                f"lambda_schedule: must be callable, got {schedule!r}; pass a LambdaSchedule, or a function of (step, "
                "total_steps)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the length of the run once, because gradient accumulation may change during the run."""
        self._total_steps = run_length(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        accuracy = () if self._accuracy is None else (self._accuracy.update(),)
        schedule: Callable[..., float] = self.schedule_for(pl_module)
        _head(pl_module).lambda_ = schedule(trainer.global_step, self._total_steps, *accuracy)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Store the loss for a later check, so that this step does not wait for the device."""
        loss = loss.detach().clone()  # a CUDA graph reuses the memory of its outputs
        self._losses.append((trainer.global_step, _head(pl_module).lambda_, loss))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Queue the accuracy of the step."""
        if self._accuracy is not None:
            self._accuracy.end_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Log lambda and stop a diverged run, every ``log_every_n_steps`` steps and at the end of an epoch.

        In ``on_train_epoch_end``, Lightning's progress bar would make rank 0 wait for the other ranks.
        """
        every = trainer.log_every_n_steps or _MAX_STEPS  # type: ignore[attr-defined]
        if trainer.is_last_batch or trainer.should_stop or trainer.global_step % every == 0:
            lambda_ = _head(pl_module).lambda_
            pl_module.log("lambda", lambda_)  # not at every step, because it takes half a millisecond
            # `prog_bar=True` would wait for the device at every step
            trainer.progress_bar_metrics["lambda"] = lambda_
            if self._accuracy is not None:
                pl_module.log("train/margin_acc", self._accuracy.value)
            self._stop_if_diverged(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a diverged run that ends within an epoch."""
        self._stop_if_diverged(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a diverged run before a validation can make it the best checkpoint."""
        self._stop_if_diverged(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop a diverged run before it overwrites a good checkpoint."""
        self._stop_if_diverged(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._accuracy is None else self._accuracy.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._accuracy is not None and state_dict:
            self._accuracy.load_state_dict(state_dict)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._accuracy is not None:
            self._accuracy.detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _stop_if_diverged(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._losses:
            return
        steps, lambdas, losses = zip(*self._losses, strict=True)
        self._losses.clear()
        finite = torch.stack(losses).isfinite()
        first = torch.where(finite, _NEVER, torch.tensor(steps, device=finite.device)).min()
        # reduced, so that all ranks stop at once and none waits for another
        step = int(trainer.strategy.reduce(first, reduce_op="min"))
        if step == _NEVER:
            return
        paths = [
            getattr(callback, kind, "")
            for kind in ("best_model_path", "last_model_path")
            for callback in trainer.checkpoint_callbacks
        ]
        kept = next(filter(os.path.exists, paths), "none was saved yet")
        precision = trainer.precision
        overflow = f"Precision {precision} overflows above 65504: try bf16-mixed or 32-true. "
        raise DivergenceError(
            f"The training loss was NaN or infinite at optimiser step {step}, where lambda was "
            f"{dict(zip(steps, lambdas, strict=True)).get(step, math.nan):.4g} (margin {_head(pl_module).margin}). "
            + (overflow if str(precision).startswith("16") else "")
            + "Try a lower learning rate, slower annealing "
            "(a larger `gain` or `fraction`, or a smaller `gamma`), or a `lambda_min` above 0. "
            f"Last good checkpoint: {kept}."
        )


def _head(pl_module: LightningModule) -> LSoftmaxLinear:
    """Return the head of a checked module, also if another module wraps it, which would keep lambda for itself."""
    head: LSoftmaxLinear = pl_module.head  # type: ignore[assignment]
    heads = [module for module in head.modules() if isinstance(module, LSoftmaxLinear)] or [head]
    return next((each for each in heads if each.weight.requires_grad), heads[0])
