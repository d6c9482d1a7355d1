"""Resuming a run so that it ends with the same weights."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from ..errors import InputError
from ..seeds import global_seed, hashed_seed
from .best_checkpoint import relocate

_KEY = "exact_resume"  # in a checkpoint


class ExactResume(Callback):
    """Let a resumed run end with the weights that it would have had without the interruption.

    The order of the data is up to the datamodule. Lightning 2.6 alone differs in the following, which is mended here:

    - Draws of layers (dropout): here those of each batch, from the generators of Python, NumPy and torch, are a
      function of the run's seed, the batch and the rank. Ranks, too, then drop different units.
    - The number of epochs, of a run of ``max_steps`` that is resumed at the end of one: it is counted twice, the
      shuffle of the next one is left out, and ``max_epochs`` ends the run an epoch early.
    - The rest of an epoch in which ``max_steps`` or ``max_time`` ended the run: with a larger limit, it is skipped.
    - The learning rate under ``ReduceLROnPlateau``, which does not step for the epoch in which a run is resumed.
    - A run that ``EarlyStopping`` ended: resumed, it trains on.
    - ``GradientAccumulationScheduler`` and ``StochasticWeightAveraging``, which act at the start of an epoch only, when
      a run is resumed within one.
    - Weights of ``64-true``, which are rounded to float32.
    - The best checkpoint of a run whose folder was moved, or that continues in another folder
      (:func:`~lsoftmax_lightning.callbacks.best_checkpoint.relocate`).

    A checkpoint from before the validation, or the end of an epoch, that belongs to its step is not enough: Lightning
    leaves that out. :class:`LastCheckpoint` saves no such checkpoint; ``every_n_train_steps`` may.

    Raises:
        InputError: When a run is resumed with another seed.
    """

    def __init__(self) -> None:
        self._seed = 0
        self._watched: dict[str, float] = {}
        self._plateau_step_pending = False  # whether the scheduler has not stepped for the interrupted epoch
        self._resumed_within_epoch = False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Read the seed of ``seed_everything``, or 0, as the datamodules do."""
        self._seed = global_seed() or 0
        self._accelerated = torch.accelerator.is_available()  # which takes its time
        self._watched, self._plateau_step_pending, self._resumed_within_epoch = {}, False, False
        trainer.precision_plugin.convert_module(pl_module)  # before the weights are loaded, which Lightning does first

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: object, batch_idx: int) -> None:
        """Seed the generators of the process; at the first batch after an interruption, make up for what is missing."""
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
        else:  # that would record for later, with a traceback, the call for accelerators
            torch.default_generator.manual_seed(seed)

    def _step_plateau_schedulers(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = self._latest_metrics(trainer)
        for config in trainer.lr_scheduler_configs:
            if _is_plateau(config) and trainer.current_epoch % config.frequency == 0 and config.monitor in metrics:
                pl_module.lr_scheduler_step(config.scheduler, metrics[config.monitor])

    def _latest_metrics(self, trainer: Trainer) -> dict[str, Any]:
        """Return the latest metrics, of this run or, before it has any, of the checkpoint."""
        return self._watched | trainer.callback_metrics

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the seed and the metrics that schedulers monitor; undo the count of an epoch that is cut short."""
        names = {config.monitor for config in trainer.lr_scheduler_configs if _is_plateau(config)}
        watched = {name: float(value) for name, value in self._latest_metrics(trainer).items() if name in names}
        checkpoint[_KEY] = {"seed": self._seed, "watched": watched}
        if not trainer.is_last_batch and "loops" in checkpoint:
            for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                counts["processed"] = min(counts["processed"], counts["completed"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Load what was saved, and take back the first count of an epoch, which the Trainer makes again."""
        if trainer.state.fn != "fit":
            for callback in (
                trainer.checkpoint_callbacks
            ):  # its state matters to training only, and names files that may have moved
                checkpoint.get("callbacks", {}).pop(callback.state_key, None)
            return
        saved = checkpoint.get(_KEY, {"seed": self._seed, "watched": {}})
        if saved["seed"] != self._seed:
            raise InputError(
                f"the run has seed {saved['seed']} and cannot continue with {self._seed}: its shuffle and draws would "
                f"be others. Set --seed_everything {saved['seed']} (in Python, seed_everything)."
            )
        relocate(checkpoint, trainer)
        self._watched = saved["watched"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        current = progress["current"]
        self._plateau_step_pending = current["ready"] > current["completed"]
        self._resumed_within_epoch = current["ready"] > current["processed"]
        for stopping in trainer.early_stopping_callbacks:
            if checkpoint["callbacks"].get(stopping.state_key, {}).get("stopping_reason"):
                rank_zero_info("EarlyStopping ended this run; it continues without that callback only.")
                trainer.should_stop = True
        if trainer.max_steps == -1:
            return
        for counts in progress.values():
            if counts["processed"] == counts["completed"] + 1:
                counts["processed"] -= 1


def _is_plateau(config: Any) -> bool:
    """Return whether a scheduler steps by a metric at the end of an epoch."""
    return bool(config.reduce_on_plateau) and config.interval == "epoch"
