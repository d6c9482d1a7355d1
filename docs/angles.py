"""Prints accuracy and angles of trained models on the test images, one row for each margin.

Usage: python docs/angles.py {DigitsDataModule,MNISTDataModule} CHECKPOINT [CHECKPOINT ...]
"""

from __future__ import annotations

import sys
from collections import defaultdict

import torch
from torch import Tensor

from lsoftmax_lightning import ClassificationModule, datamodules
from lsoftmax_lightning.functional import separation
from lsoftmax_lightning.metrics import ClassAngles


def embed_test_set(path: str, data: datamodules.ImageDataModule) -> tuple[ClassificationModule, Tensor, Tensor]:
    """A model in evaluation mode, and the features and classes of all test images."""
    model = ClassificationModule.load_from_checkpoint(path, map_location="cpu").eval().requires_grad_(False)
    data.setup("test")
    features = [model.embed(data.normalize(images)) for images, _ in data.test_dataloader()]
    return model, torch.cat(features), data.test_data.targets


def main(datamodule: str, *checkpoints: str) -> None:
    """Prints the table."""
    data = getattr(datamodules, datamodule)()
    rows = defaultdict(list)
    for path in checkpoints:
        model, features, targets = embed_test_set(path, data)
        metric = ClassAngles(data.num_classes, features.shape[1], model.head.margin)
        metric.update(features, model.head.weight, targets)
        figures = metric.compute()
        accuracy = (model.head(features).argmax(1) == targets).float().mean()
        weights = separation(model.head.weight).min
        rows[model.head.margin].append([100 * accuracy, figures["angle"], weights, figures["centre_angle_min"]])
    print("m, runs: accuracy %, sample to its class, nearest classes, nearest centres (degrees); mean ± sd")
    for margin, values in sorted(rows.items()):
        table = torch.tensor(values)
        spread = table.std(0) if len(table) > 1 else torch.full_like(table[0], torch.nan)
        print(
            f"{margin}, {len(table)}:",
            ", ".join(f"{a:.2f} ± {b:.2f}" for a, b in zip(table.mean(0), spread, strict=True)),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
