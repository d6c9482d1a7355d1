"""Train with the default schedule of lambda on 1,000 and 10,000 classes of synthetic images.

Each class is a random 8x8 image; its samples are noisy copies: four for training, one for validation and one for the
test.

Usage: python benchmarks/many_classes.py [--classes 1000 10000] [--margins 1 2 4] [--seeds 0] [--steps 3000]
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import torch
from common import machine, table
from lightning import Trainer, seed_everything
from torch import nn
from torch.optim import SGD

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.callbacks import MarginMonitor
from lsoftmax_lightning.datamodules import ImageDataModule
from lsoftmax_lightning.datamodules.base import Images
from lsoftmax_lightning.lr_schedulers import FractionalMultiStepLR

BATCH_SIZE = 1000
NOISE = 60.0


class RandomClasses(ImageDataModule):
    """Noisy copies of one random image for each class."""

    image_shape = (1, 8, 8)
    mean, std = (0.5,), (0.4,)

    def __init__(self, num_classes: int) -> None:
        self.class_names = tuple(map(str, range(num_classes)))
        super().__init__(BATCH_SIZE, val_size=num_classes)

    def load(self, train: bool) -> Images:
        """Draw the images."""
        generator = torch.Generator().manual_seed(0)
        centres = torch.randint(256, (len(self.class_names), *self.image_shape), generator=generator)
        targets = torch.arange(len(centres)).repeat(5 if train else 1)
        noise = torch.randn(len(targets), *self.image_shape, generator=generator.manual_seed(1 + train))
        return Images((centres[targets] + NOISE * noise).clamp(0, 255).to(torch.uint8), targets)


class Net(nn.Sequential):
    """A small perceptron with batch normalisation."""

    num_features = 32

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 32))


def train(num_classes: int, margin: int, seed: int, steps: int) -> list[str]:
    """Train and test one network, and return a row of the table."""
    seed_everything(seed, verbose=False)
    data = RandomClasses(num_classes)
    model = ClassificationModule(
        num_classes=num_classes,
        image_shape=data.image_shape,
        backbone=Net(),
        margin=margin,
        optimizer=lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=lambda optimizer: FractionalMultiStepLR(optimizer, [0.6, 0.85]),
    )
    settings: dict[str, Any] = {"limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=steps, callbacks=[MarginMonitor()], **settings)
    trainer.fit(model, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    lambda_ = "-" if margin == 1 else f"{float(model.head.lambda_):.3g}"
    (test,) = trainer.test(model, data, verbose=False)
    return [
        f"{num_classes:,}",
        str(margin),
        str(seed),
        f"{metrics['train/acc']:.1%}",
        lambda_,
        f"{test['test/acc']:.1%}",
        f"{test['test/angle']:.1f}",
    ]


def main() -> None:
    """Train all combinations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--margins", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = []
    for num_classes in args.classes:
        for margin in args.margins:
            for seed in args.seeds:
                rows.append(train(num_classes, margin, seed, args.steps))
                print(*rows[-1], flush=True)
    header = ["classes", "m", "seed", "train/acc", "last lambda", "test accuracy", "angle to own class, degrees"]
    print(f"\n{machine()}\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
