"""Prints accuracy and angles of trained models on the test images, one row for each margin.

Usage: python docs/angles.py {DigitsDataModule,MNISTDataModule} CHECKPOINT [CHECKPOINT ...]
"""

from __future__ import annotations

import sys
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lsoftmax_lightning import ClassificationModule, datamodules


def embed_test_set(path: str, data: datamodules.ImageDataModule) -> tuple[ClassificationModule, Tensor, Tensor]:
    """A model in evaluation mode, and the features and classes of all test images."""
    model = ClassificationModule.load_from_checkpoint(path, map_location="cpu").eval().requires_grad_(False)
    data.setup("test")
    features = [model.embed(data.normalize(images)) for images, _ in data.test_dataloader()]
    return model, torch.cat(features), data.test_data.targets


def degrees(cosine: Tensor) -> Tensor:
    """Angles of cosines, which rounding may have put outside [-1, 1]."""
    return cosine.clamp(-1, 1).arccos().rad2deg()


def smallest_angle(directions: Tensor) -> Tensor:
    """The smallest angle between any two rows, in degrees."""
    unit = normalize(directions)
    return degrees((unit @ unit.T).fill_diagonal_(-1)).min()


def main(datamodule: str, *checkpoints: str) -> None:
    """Prints the table."""
    data = getattr(datamodules, datamodule)()
    rows = defaultdict(list)
    for path in checkpoints:
        model, features, targets = embed_test_set(path, data)
        centres = torch.stack([normalize(features[targets == k]).mean(0) for k in range(data.num_classes)])
        rows[model.head.margin].append(
            [
                100 * (model.head(features).argmax(1) == targets).float().mean(),
                degrees(torch.cosine_similarity(features, model.head.weight[targets])).mean(),
                smallest_angle(model.head.weight),
                smallest_angle(centres),
            ]
        )
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
