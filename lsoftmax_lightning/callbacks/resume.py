"""Going on where a run stopped, to the same weights."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer

from ..errors import InputError

_KEY = "exact_resume"  # in a checkpoint


class ExactResume(Callback):
    """Has a resumed run end with the weights that it would have ended with, had it not been interrupted.

    The order of the data is the datamodule's affair. What Lightning 2.6 alone would have different is:

    - what layers draw (dropout): here each batch's draws, from the generators of Python, NumPy and torch, are a
      function of the run's seed, the batch and the process. Several processes, too, then drop different units.
    - the count of epochs, of a run of ``max_steps`` that is resumed at the end of one: it is counted twice, the shuffle
      of the next one is left out, and ``max_epochs`` ends the run an epoch early.
    - the learning rate under ``ReduceLROnPlateau``, which Lightning does not tell of the epoch in which it resumes.

    A checkpoint from before the validation, or the end of an epoch, that belongs to its step is not enough for it:
    Lightning leaves that out. :class:`LastCheckpoint` makes none such; ``every_n_train_steps`` may.

    Raises:
        InputError: When it resumes under another seed.
    """

    def __init__(self) -> None:
        self._seed = 0
        self._watched: dict[str, float] = {}
        self._owed = False  # whether the scheduler is still to be told of the epoch that was interrupted

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Takes the seed of ``seed_everything``, or 0, as the datamodules do."""
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._accelerated = torch.accelerator.is_available()  # which takes its time
        self._watched, self._owed = {}, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: object, batch_idx: int) -> None:
        """Seeds the generators of the process; the first time after an interruption, mends the learning rate."""
        if self._owed and batch_idx == 0:
            self._owed = False
            self._tell_schedulers(trainer, pl_module)
        draw = f"{self._seed} {trainer.current_epoch} {batch_idx} {trainer.global_rank}"
        seed = random.Random(draw).getrandbits(32)
        random.seed(seed)
        np.random.seed(seed)
        if self._accelerated:
            torch.manual_seed(seed)
        else:  # that would note down for later, with where it was called, what an accelerator is to be told
            torch.default_generator.manual_seed(seed)

    def _tell_schedulers(self, trainer: Trainer, pl_module: Any) -> None:
        measured = self._measured(trainer)
        for config in trainer.lr_scheduler_configs:
            if _watches(config) and trainer.current_epoch % config.frequency == 0 and config.monitor in measured:
                pl_module.lr_scheduler_step(config.scheduler, measured[config.monitor])

    def _measured(self, trainer: Trainer) -> dict[str, Any]:
        """What was measured last, in this run or, before anything was, in the one it goes on from."""
        return self._watched | trainer.callback_metrics

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps the seed, and what was last measured of what the learning rate depends on."""
        names = {config.monitor for config in trainer.lr_scheduler_configs if _watches(config)}
        watched = {name: float(value) for name, value in self._measured(trainer).items() if name in names}
        checkpoint[_KEY] = {"seed": self._seed, "watched": watched}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Takes up what was kept, and takes back the first count of an epoch, which the Trainer makes again."""
        kept = checkpoint.get(_KEY, {"seed": self._seed, "watched": {}})
        if kept["seed"] != self._seed:
            raise InputError(
                f"the run has seed {kept['seed']} and cannot go on with {self._seed}: its shuffle and draws would be "
                f"others. Set --seed_everything {kept['seed']} (in Python, seed_everything)."
            )
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        self._watched = kept["watched"]
        self._owed = progress["current"]["ready"] > progress["current"]["completed"]  # not of an epoch that was ended
        if trainer.max_steps == -1:
            return
        for counts in progress.values():
            if counts["processed"] == counts["completed"] + 1:
                counts["processed"] -= 1


def _watches(config: Any) -> bool:
    """Whether a scheduler moves by what was measured at the end of an epoch."""
    return bool(config.reduce_on_plateau) and config.interval == "epoch"
