"""Trains with `fit`, again and again, each time in a process that is stopped: `python interrupted.py HOW SEED ARGS...`.

Python and torch are imported once; each training is a fork.
"""

import os
import random
import signal
import sys
import threading
import traceback
from typing import Any

import numpy as np
from lightning import Callback
from torch import Tensor, nn

from lsoftmax_lightning.datamodules import DigitsDataModule
from lsoftmax_lightning.lightning_cli import LSoftmaxCLI
from lsoftmax_lightning.transforms import RandomCropFlip
from lsoftmax_lightning.user_errors import errors_without_traceback


class Random(nn.Sequential):
    """A backbone that draws from all generators there are."""

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
    """Digits, each time in another place."""

    def __init__(self) -> None:
        super().__init__()
        self.augment = RandomCropFlip(padding=1)


class Stop(Callback):
    """Kills the process amid a batch or a validation, or at any time sends it a signal."""

    def __init__(self, how: str, draw: random.Random) -> None:
        self.how = how
        self.countdown = draw.randrange(1, 40 if how == "batch" else 5)
        self.seconds = draw.uniform(0, 0.3)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.how.startswith("SIG") and self.countdown:
            self.countdown = 0
            timer = threading.Timer(self.seconds, os.kill, (os.getpid(), getattr(signal, self.how)))
            timer.daemon = True
            timer.start()

    def _count(self, amid: str) -> None:
        if amid == self.how:
            self.countdown -= 1
            if self.countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._count("batch")

    def on_validation_batch_end(self, *args: Any) -> None:
        self._count("validation")


def amid_a_checkpoint(countdown: int) -> None:
    fsync = os.fsync

    def half_written(descriptor: int) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = half_written


def train(args: list[str], how: str, draw: random.Random) -> None:
    """What a fork does."""
    if how == "checkpoint":
        amid_a_checkpoint(draw.randrange(1, 6))
    with errors_without_traceback():
        LSoftmaxCLI(args, callbacks=[Stop(how, draw)])


def fork(args: list[str], how: str, draw: random.Random) -> int:
    """The exit code of a training; of one that was killed, the signal, negative."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(args, how, draw)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    hows, seed, *arguments = sys.argv[1:]
    draws = random.Random(seed)
    for each in hows.split(","):
        print(each, fork(arguments, each, draws), flush=True)
