"""Training with `fit` that stops itself at a random moment, with a backbone and data that draw from all generators."""

import os
import random
import signal
import threading
from typing import Any

import numpy as np
from lightning import Callback, Trainer
from torch import Tensor, nn

from lsoftmax_lightning.datamodules import DigitsDataModule
from lsoftmax_lightning.lightning_cli import LSoftmaxCLI
from lsoftmax_lightning.transforms import RandomCropFlip
from lsoftmax_lightning.user_errors import errors_without_traceback


class Random(nn.Sequential):
    """Backbone that draws from the generators of Python, NumPy and torch."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * np.random.randn() + 0.1 * random.random()
        return super().forward(x)


class Shifted(DigitsDataModule):
    """Digits under random shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.augment = RandomCropFlip(padding=1)


class Stop(Callback):
    """Kill the process within a batch or a validation, or send it a signal at any time.

    Args:
        how: Name of a signal, ``batch``, ``validation``, or anything else to do nothing.
        draw: Draws the moment.
    """

    def __init__(self, how: str, draw: random.Random) -> None:
        self.how = how
        self.countdown = draw.randrange(1, 30 if how == "batch" else 5)
        self.seconds = draw.uniform(0, 0.1)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.how.startswith("SIG") and self.countdown:
            self.countdown = 0
            timer = threading.Timer(self.seconds, os.kill, (os.getpid(), getattr(signal, self.how)))
            timer.daemon = True
            timer.start()

    def _count(self, where: str) -> None:
        if where == self.how:
            self.countdown -= 1
            if self.countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._count("batch")

    def on_validation_batch_end(self, *args: Any) -> None:
        self._count("validation")


class TerminateAt(Callback):
    """Send SIGTERM to the process of rank zero in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def kill_in_a_checkpoint(countdown: int) -> None:
    """Kill the process when half of a file is written, at the ``countdown``-th call of fsync."""
    fsync = os.fsync

    def half_written(descriptor: int) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = half_written


def train(args: list[str], how: str, seed: int) -> None:
    """Run the command line until it is stopped; call it in a separate process.

    Args:
        args: Arguments of the command line.
        how: See :class:`Stop`, or ``checkpoint``.
        seed: Seed of the moment to stop.
    """
    draw = random.Random(seed)
    if how == "checkpoint":
        kill_in_a_checkpoint(draw.randrange(1, 6))
    with errors_without_traceback():
        LSoftmaxCLI(args, callbacks=[Stop(how, draw)])
