"""Images per second of `fit` and of a bare loop, and the gain of the switches.

Both train the same network on the same images with the same steps. `fit` is the command line with a shipped config,
including logging, metrics, annealing, monitor, dashboard and progress bar. The bare loop takes batches from the same
datamodule, and runs forward, loss, backward and SGD, for one epoch after each epoch of `fit` in the same process.
Validation is excluded. A bare Trainer, with a module that does the same as the loop, without callbacks and logger,
shows the overhead of Lightning. Then channels_last, bf16 and torch.compile are timed in `fit`, and the main thread in a
step of a linear network, which is nearly all Python.

Usage: python benchmarks/step.py [EPOCHS]
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, ratio, table
from lightning import Callback, LightningDataModule, LightningModule, Trainer

from lsoftmax_lightning import ClassificationModule, LSoftmaxLinear
from lsoftmax_lightning.backbones import create_backbone
from lsoftmax_lightning.datamodules import CIFAR10DataModule, DigitsDataModule
from lsoftmax_lightning.datamodules.base import Images
from lsoftmax_lightning.lightning_cli import LSoftmaxCLI

CASES = {"digits": ("digits.yaml", "DigitsDataModule", 64), "cifar10": ("cifar10.yaml", "step.Generated", 64)}
IMAGES = {"digits": 1280, "cifar10": 640}  # of an epoch
SWITCHES = {
    "as shipped": [],
    "channels_last": ["--model.channels_last=true"],
    "bf16-mixed": ["--trainer.precision=bf16-mixed"],
    "channels_last, bf16-mixed": ["--model.channels_last=true", "--trainer.precision=bf16-mixed"],
    "compile": ["--model.compile=true"],
}


class Generated(CIFAR10DataModule):
    """Generated images instead of CIFAR-10: 10 steps of 64 per epoch."""

    def load(self, train: bool) -> Images:
        """Draw noise."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (712, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Images(images, torch.arange(712) % 10)

    def prepare_data(self) -> None:
        """Skip the download."""


class Clock(Callback):
    """Measure the seconds of each training epoch, and of an epoch of a bare loop after it."""

    def __init__(self, bare: bool) -> None:
        self.bare = bare
        self.fit: list[float] = []
        self.loop: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Stop the clock after the last batch."""
        if trainer.is_last_batch:
            self.fit.append(time.perf_counter() - self.start)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Run the bare loop."""
        if self.bare:
            self.loop.append(self.epoch(trainer, pl_module))

    def epoch(self, trainer: Any, pl_module: Any) -> float:
        """Return the seconds of an epoch of a bare loop."""
        backbone, head = copy.deepcopy(pl_module.backbone), pl_module.head
        head = LSoftmaxLinear(head.in_features, head.num_classes, head.margin, head.lambda_)
        parameters = [*backbone.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)
        data = trainer.datamodule
        start = time.perf_counter()
        for batch in data.train_dataloader():
            images, target = data.on_after_batch_transfer(batch, 0)
            optimizer.zero_grad()
            F.cross_entropy(head(backbone(images), target), target).backward()
            optimizer.step()
        return time.perf_counter() - start


class BareModule(LightningModule):
    """A module that does the same as the bare loop."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = LSoftmaxLinear(backbone.num_features, 10, margin=4, lambda_=5.0)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        images, target = batch
        return F.cross_entropy(self.head(self.backbone(images), target), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


class Linear(torch.nn.Sequential):
    """A network that takes almost no time."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 16))


class Tiny(ClassificationModule):
    """The module of the configs with this network."""

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, backbone=Linear(), **kwargs)


class ThreadClock(Callback):
    """Measure the milliseconds of the main thread from the end of a step to the end of the next one."""

    def __init__(self) -> None:
        self.plain: list[float] = []
        self.logged: list[float] = []
        self.last = 0.0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Take the time since the last step, except in the first step of an epoch and in the first epoch."""
        now = time.thread_time()
        if trainer.current_epoch and not trainer.is_last_batch and args[2]:
            # loggers write after this hook
            times = self.logged if (trainer.global_step - 1) % trainer.log_every_n_steps == 0 else self.plain
            times.append(1e3 * (now - self.last))
        self.last = now


def run_bare(backbone: torch.nn.Module, data: LightningDataModule, epochs: int, clock: Any) -> None:
    """Train like :func:`run`, with a bare Trainer."""
    names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    settings = {"accelerator": "cpu", "limit_val_batches": 0, **dict.fromkeys(names, False)}
    Trainer(max_epochs=epochs + 1, callbacks=[clock], **settings).fit(BareModule(backbone), data)


def run(config: str, data: str, batch_size: int, epochs: int, bare: bool, *switches: str) -> Clock:
    """Train for a number of epochs, after one that is not counted."""
    clock = Clock(bare)
    arguments = [f"--data={data}", f"--data.batch_size={batch_size}", f"--trainer.max_epochs={epochs + 1}"]
    length = ["--trainer.max_steps=-1", "--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=1.0"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        LSoftmaxCLI(["fit", f"--config={config}", *arguments, *length, *switches], callbacks=[clock])
    del clock.fit[0], clock.loop[:1]
    return clock


def thread_times(rounds: int) -> list[list[str]]:
    """Return the rows of the table of thread time."""
    clocks: dict[str, list[ThreadClock]] = {"bare Trainer": [], "`fit`": []}
    for _ in range(rounds):
        for clock in clocks.values():
            clock.append(ThreadClock())
        run_bare(Linear(), DigitsDataModule(64), 10, clocks["bare Trainer"][-1])
        arguments = ["--model=step.Tiny", "--trainer.max_epochs=11", "--trainer.limit_val_batches=0"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            LSoftmaxCLI(["fit", "--config=digits.yaml", *arguments], callbacks=[clocks["`fit`"][-1]])
    rows = []
    for name, found in clocks.items():
        plain = [time for clock in found for time in clock.plain]
        logged = [time for clock in found for time in clock.logged]
        rows.append(
            [name, f"{statistics.median(plain):.2f}", f"{statistics.median(logged):.2f}" if "fit" in name else "-"]
        )
    return rows


def main(rounds: int = 10) -> None:
    """Print the tables."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    print(f"{machine()}.\n")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = []
        for name, case in CASES.items():
            data = DigitsDataModule(64) if name == "digits" else Generated(64)
            bare = Clock(True)
            run_bare(create_backbone(name, data.image_shape), data, rounds, bare)
            del bare.fit[0], bare.loop[0]
            clock = run(*case, rounds, bare=True)
            rates = [f"{IMAGES[name] / statistics.median(times):,.0f}" for times in (clock.fit, clock.loop)]
            rows.append([name, *rates, ratio(clock.loop, clock.fit), ratio(bare.loop, bare.fit)])
        header = ["network", "fit, images/s", "bare loop, images/s", "fit to bare loop", "bare Trainer to bare loop"]
        print(table(header, rows), flush=True)

        for name, case in CASES.items():
            short = [f"--trainer.limit_train_batches={10 if name == 'digits' else 1}", "--dashboard.every_n_epochs=0"]
            short += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
            times: dict[str, list[float]] = {switch: [] for switch in SWITCHES}
            for _ in range(2):
                for switch, settings in SWITCHES.items():
                    times[switch] += run(*case, 2, False, *short, *settings).fit
            rows = [[switch, ratio(times["as shipped"], seconds)] for switch, seconds in times.items()]
            print(table([f"{name}, with", "images/s, to as shipped"], rows), flush=True)
        print(table(["milliseconds of a step", "of one that is not logged", "of one that is"], thread_times(rounds)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
