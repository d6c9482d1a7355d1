"""What share of the time of training MarginMonitor and Dashboard take, at their defaults.

Every hook of theirs is timed in the run itself. Training is the time from the first step to the last, with all
validations; drawing that was put off comes after that, and is given in seconds.

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
from lsoftmax_lightning.callbacks.observer import HeadObserver
from lsoftmax_lightning.datamodules import CIFAR10DataModule, DigitsDataModule, ImageDataModule
from lsoftmax_lightning.datamodules.base import Images

SMALL = {"stem": 32, "blocks": [(32, 1), (64, 1), (128, 1)], "num_features": 128}
spent = 0.0


class Photographs(CIFAR10DataModule):
    """Generated images in the place of CIFAR-10's: 50 steps of 128 an epoch, and 712 to validate on."""

    def load(self, train: bool) -> Images:
        """Noise around a brightness for each class."""
        generator = torch.Generator().manual_seed(0)
        targets = torch.arange(7120) % 10
        noise = torch.randint(200, (7120, 3, 32, 32), generator=generator)
        return Images((noise + 5 * targets[:, None, None, None]).to(torch.uint8), targets)

    def prepare_data(self) -> None:
        """Nothing to download."""


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, adding what it takes to ``spent``."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        global spent
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent += time.perf_counter() - start

    return wrapper


def run(data: ImageDataModule, backbone: str, args: dict[str, Any], epochs: int) -> tuple[float, float, float]:
    """Seconds of training, of the hooks in training, and of fit after training."""
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
    """Prints the table."""
    warnings.simplefilter("ignore")
    for owner in (HeadObserver, MarginMonitor, Dashboard):
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
        shares = [hooks / training for training, hooks, _ in times]
        training, _, after = map(statistics.median, zip(*times, strict=True))
        spread = f"{min(shares):.1%} .. {max(shares):.1%}"
        rows.append([name, f"{training:.1f}", f"{statistics.median(shares):.1%}", spread, f"{after:.1f}"])
    header = ["network", "training, s", f"share, median of {rounds}", "least .. most", "drawing after training, s"]
    print(table(header, rows))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
