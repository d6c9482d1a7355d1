"""Fraction of the training time that MarginMonitor and Dashboard take with default settings.

All their hooks are timed in the run itself. Training is the time from the first step to the last, with all
validations. Drawing that is deferred until after training is given in seconds.

Usage: python benchmarks/dashboard.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import machine, table
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import TensorBoardLogger

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.callbacks import Dashboard, MarginMonitor
from lsoftmax_lightning.dashboard.collector import SnapshotObserver
from lsoftmax_lightning.dashboard.observer import HeadObserver
from lsoftmax_lightning.datamodules import CIFAR10DataModule, DigitsDataModule, ImageDataModule
from lsoftmax_lightning.datamodules.base import Images

SMALL = {"stem": 32, "blocks": [(32, 1), (64, 1), (128, 1)], "num_features": 128}
spent = 0.0
is_timing = False


class Photographs(CIFAR10DataModule):
    """Generated images instead of CIFAR-10: 50 steps of 128 per epoch, and 712 validation images."""

    def load(self, train: bool) -> Images:
        """Draw noise around a brightness for each class."""
        generator = torch.Generator().manual_seed(0)
        targets = torch.arange(7120) % 10
        noise = torch.randint(200, (7120, 3, 32, 32), generator=generator)
        return Images((noise + 5 * targets[:, None, None, None]).to(torch.uint8), targets)

    def prepare_data(self) -> None:
        """Skip the download."""


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to add its time to ``spent``, except for calls within another timed function."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        global spent, is_timing
        if is_timing:
            return function(*args, **kwargs)
        is_timing = True
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent += time.perf_counter() - start
            is_timing = False

    return wrapper


def run(data: ImageDataModule, backbone: str, args: dict[str, Any], epochs: int) -> tuple[float, float, float]:
    """Return the seconds of training, of the hooks in training, and of fit after training."""
    global spent
    seed_everything(0, verbose=False)
    model = ClassificationModule(10, backbone, margin=4, image_shape=data.image_shape, backbone_args=args)
    timer = Timer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=TensorBoardLogger(folder, default_hp_metric=False),
            callbacks=[timer, MarginMonitor(), Dashboard()],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        spent, after = 0.0, -time.perf_counter()
        trainer.fit(model, data)
        after += time.perf_counter() - timer.time_elapsed("train")
        return timer.time_elapsed("train"), spent, after


def main(rounds: int = 3) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    for owner in (HeadObserver, SnapshotObserver, MarginMonitor, Dashboard):
        for name, function in list(vars(owner).items()):
            if name == "_forward_hook" or (name.startswith("on_") and name != "on_fit_end"):
                setattr(owner, name, timed(function))
    print(f"{machine('matplotlib')}.\n")
    rows = []
    for name, *case in (
        ("digits, 30 epochs", DigitsDataModule(), "digits", {}, 30),
        ("4 convolutions on 32x32, 5 epochs", Photographs(128), "cifar10", SMALL, 5),
    ):
        times = [run(*case) for _ in range(rounds)]
        fractions = [hooks / training for training, hooks, _ in times]
        training, _, after = map(statistics.median, zip(*times, strict=True))
        spread = f"{min(fractions):.1%} .. {max(fractions):.1%}"
        rows.append([name, f"{training:.1f}", f"{statistics.median(fractions):.1%}", spread, f"{after:.1f}"])
    header = ["network", "training, s", f"share, median of {rounds}", "least .. most", "drawing after training, s"]
    print(table(header, rows))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
