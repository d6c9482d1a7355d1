"""Task of each of 1, 2 and 4 processes: train networks for 50 steps, and test one on datasets of many sizes."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer, seed_everything
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn

from lsoftmax_lightning.callbacks import MarginMonitor
from lsoftmax_lightning.datamodules.base import Images
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.transforms import RandomCropFlip

from .training import BlobsDataModule, make_model, make_trainer

SIZES = (1, 2, 5, 8, 9, 12, 15, 16)  # incomplete, one complete, and several batches of 8


class Sum(torch.autograd.Function):
    """Sum of values and gradients over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return Sum.forward(ctx, gradients[0])


class SyncedNorm(nn.BatchNorm1d):
    """SyncBatchNorm on CPUs, where torch does not support it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = len(x) * dist.get_world_size()
        mean = Sum.apply(x.sum(0)) / count  # type: ignore[no-untyped-call]
        variance = Sum.apply((x - mean).square().sum(0)) / count  # type: ignore[no-untyped-call]
        for running, value in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1))):
            assert running is not None
            running.lerp_(value.detach(), 0.1)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class Net(nn.Sequential):
    num_features = 16

    def __init__(self, *norm: nn.Module) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 32), *norm, nn.ReLU(), nn.Linear(32, 16))


class OfSize(BlobsDataModule):
    """Blobs with a given number of test images."""

    def __init__(self, size: int) -> None:
        super().__init__(batch_size=8)
        self.size = size

    def load(self, train: bool) -> Images:
        images, targets = super().load(train)
        return Images(images[: self.size], targets[: self.size])


def trainer(**settings: Any) -> Trainer:
    devices = int(os.environ["WORLD_SIZE"])
    return make_trainer(strategy="ddp", devices=devices, callbacks=[MarginMonitor()], **settings)


def train(precision: Any, *norm: nn.Module, **settings: Any) -> dict[str, Tensor]:
    """Return the weights after 50 steps, and the losses of a validation on 37 images."""
    seed_everything(0)
    data = BlobsDataModule(batch_size=16, val_size=37)
    data.augment = RandomCropFlip(padding=1, flip=True)
    model = make_model(backbone=Net(*norm), margin=4, **settings)
    trained = trainer(max_epochs=-1, max_steps=50, precision=precision)
    trained.fit(model, data)
    assert trained.global_step == 50
    return model.state_dict() | {name: trained.callback_metrics[name] for name in ("val/loss", "val/margin_loss")}


def test(size: int) -> dict[str, float] | str:
    """Return the metrics of a test on this number of images, or the error message."""
    try:
        tested = trainer()
        tested.test(make_model(), OfSize(size), verbose=False)
    except InputError as error:
        return str(error)
    return {name: float(value) for name, value in tested.callback_metrics.items()}


def work(folder: Path) -> None:
    """Save weights and metrics in the folder."""
    weights = {
        f"{name}{precision}": train(precision, *norms)
        for precision in ("32-true", "64-true")
        for name, norms in (("", []), ("synced-norm-", [SyncedNorm(32)]))
    }
    plateau = partial(ReduceLROnPlateau, monitor="train/loss", patience=0, factor=0.5)
    weights["plateau"] = train("64-true", lr_scheduler=plateau)
    metrics = {size: test(size) for size in SIZES}
    if os.environ["RANK"] == "0":
        count = os.environ["WORLD_SIZE"]
        torch.save(weights, folder / f"weights_{count}.pt")
        (folder / f"metrics_{count}.json").write_text(json.dumps(metrics))
