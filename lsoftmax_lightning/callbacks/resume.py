"""Exact resume of a run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from ..compat import epoch_progress
from ..errors import InputError
from ..seeds import global_seed, hashed_seed
from .best_checkpoint import relocate

_KEY = "exact_resume"  # key in a checkpoint


class ExactResume(Callback):
    """Make a resumed run end with the weights that it would have without the interruption.

    The datamodule restores the order of the data. This callback corrects the following differences of Lightning 2.6:

    - Random draws of layers such as dropout: the callback seeds the generators of Python, NumPy and torch before each
      batch, by the run's seed, the batch and the rank. Each rank drops different units.
    - A run of ``max_steps`` that is resumed at the end of an epoch: Lightning counts the epoch twice, skips the shuffle
      of the next one, and ends the run one epoch before ``max_epochs``.
    - A run that ``max_steps`` or ``max_time`` ended within an epoch: with a larger limit, Lightning skips the remaining
      batches of the epoch.
    - ``ReduceLROnPlateau``: Lightning does not step it for the epoch in which the run is resumed.
    - ``EarlyStopping``: Lightning continues a run that it ended.
    - ``GradientAccumulationScheduler`` and ``StochasticWeightAveraging``: they act only at the start of an epoch, which
      a run that is resumed within an epoch does not reach.
    - ``64-true``: Lightning rounds the weights to float32.
    - A run whose folder was moved, or that continues in another folder: Lightning loses the best checkpoint
      (:func:`~lsoftmax_lightning.callbacks.best_checkpoint.relocate`).

    A shuffled DataLoader of your own draws the order of an epoch at its start, from the generator of torch, and so has
    another order after a resume. The datamodules of this package, or a sampler that follows ``set_epoch``, do not.

    Lightning skips a validation, or the end of an epoch, that follows the step of the checkpoint.
    :class:`LastCheckpoint` saves no checkpoint before them, but ``every_n_train_steps`` may.

    Raises:
        InputError: If a run is resumed with another seed.
    """

    def __init__(self) -> None:
        self._seed = 0
        self._watched: dict[str, float] = {}
        self._plateau_step_pending = False  # whether the scheduler has not stepped for the interrupted epoch
        self._resumed_within_epoch = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the seed of ``seed_everything``, by default 0, like the datamodules."""
        self._seed = global_seed() or 0
        self._accelerated = torch.accelerator.is_available()  # slow, so called only once
        self._watched, self._plateau_step_pending, self._resumed_within_epoch = {}, False, False
        trainer.precision_plugin.convert_module(pl_module)  # Lightning does it after it loads the weights

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Seed the generators; at the first batch of a resumed run, also call the hooks that Lightning skips."""
        if self._resumed_within_epoch:
            self._resumed_within_epoch = False
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GradientAccumulationScheduler | StochasticWeightAveraging):
                    callback.on_train_epoch_start(trainer, pl_module)
        if self._plateau_step_pending and batch_idx == 0:
            self._plateau_step_pending = False
            self._step_plateau_schedulers(trainer, pl_module)
        seed = hashed_seed(f"{self._seed} {trainer.current_epoch} {batch_idx} {trainer.global_rank}")
        random.seed(seed)
        np.random.seed(seed)
        if self._accelerated:
            torch.manual_seed(seed)
        else:  # torch.manual_seed would queue a call for accelerators, with a traceback
            torch.default_generator.manual_seed(seed)

    def _step_plateau_schedulers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = self._latest_metrics(trainer)
        for config in trainer.lr_scheduler_configs:
            if _is_plateau(config) and trainer.current_epoch % config.frequency == 0 and config.monitor in metrics:
                pl_module.lr_scheduler_step(config.scheduler, metrics[config.monitor])

    def _latest_metrics(self, trainer: Trainer) -> dict[str, Any]:
        """Return the latest metrics, from the checkpoint until the resumed run has computed its own."""
        return self._watched | trainer.callback_metrics

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the seed and the metrics that schedulers monitor; an incomplete epoch is not counted as processed."""
        names = {config.monitor for config in trainer.lr_scheduler_configs if _is_plateau(config)}
        watched = {name: float(value) for name, value in self._latest_metrics(trainer).items() if name in names}
        checkpoint[_KEY] = {"seed": self._seed, "watched": watched}
        if not trainer.is_last_batch and "loops" in checkpoint:
            for counts in epoch_progress(checkpoint).values():
                counts["processed"] = min(counts["processed"], counts["completed"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the seed and the metrics, and undo the first count of an epoch, because the Trainer repeats it."""
        if trainer.state.fn != "fit":
            # only training needs these states, which name files that may have been moved
            for callback in trainer.checkpoint_callbacks:
                checkpoint.get("callbacks", {}).pop(callback.state_key, None)
            return
        check_seed(checkpoint)
        relocate(checkpoint, trainer)
        self._watched = checkpoint.get(_KEY, {"watched": {}})["watched"]
        progress = epoch_progress(checkpoint)
        current = progress["current"]
        self._plateau_step_pending = current["ready"] > current["completed"]
        self._resumed_within_epoch = current["ready"] > current["processed"]
        for stopping in trainer.early_stopping_callbacks:
            if checkpoint["callbacks"].get(stopping.state_key, {}).get("stopping_reason"):
                rank_zero_info("EarlyStopping ended this run; remove that callback to continue.")
                trainer.should_stop = True
        if trainer.max_steps == -1:
            return
        for counts in progress.values():
            if counts["processed"] == counts["completed"] + 1:
                counts["processed"] -= 1


def check_seed(checkpoint: dict[str, Any]) -> None:
    """Reject a checkpoint of a run with another seed than that of ``seed_everything``.

    Args:
        checkpoint: A loaded checkpoint.

    Raises:
        InputError: If the seed differs.
    """
    seed = global_seed() or 0
    saved = checkpoint.get(_KEY, {"seed": seed})["seed"]
    if saved != seed:
        raise InputError(
            f"seed_everything: must be the seed of the run, {saved}, to repeat its shuffle and draws, got {seed}; set "
            f"--seed_everything {saved} (in Python, seed_everything)."
        )


def _is_plateau(config: Any) -> bool:
    """Return whether a scheduler steps by a metric at the end of an epoch."""
    return bool(config.reduce_on_plateau) and config.interval == "epoch"
