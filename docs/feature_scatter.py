"""Draws the MNIST test features of 2-D models side by side: the poster's figure.

Usage: python docs/feature_scatter.py OUTPUT.png ROOT CHECKPOINT [CHECKPOINT ...]
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch
from angles import degrees, embed_test_set
from torch.nn.functional import normalize

from lsoftmax_lightning.datamodules import MNISTDataModule


def main(output: str, root: str, *checkpoints: str) -> None:
    """Draws one panel for each checkpoint."""
    data = MNISTDataModule(root=root)
    figure, axes = plt.subplots(1, len(checkpoints), figsize=(5 * len(checkpoints), 5), squeeze=False)
    for axis, path in zip(axes[0], checkpoints, strict=True):
        model, features, targets = embed_test_set(path, data)
        accuracy = (model.head(features).argmax(1) == targets).float().mean()
        angle = degrees(torch.cosine_similarity(features, model.head.weight[targets])).mean()
        axis.scatter(*features.T, c=targets, s=2, cmap="tab10", linewidths=0)
        rays = normalize(model.head.weight) * features.norm(dim=1).quantile(0.99)
        for name, (x, y) in zip(data.class_names, rays.tolist(), strict=True):
            axis.plot([0, x], [0, y], color="black", linewidth=0.6)
            axis.annotate(name, (1.08 * x, 1.08 * y), ha="center", va="center")
        axis.set_title(f"m = {model.head.margin}: test accuracy {accuracy:.2%}, mean angle to class {angle:.1f}°")
        axis.set_aspect("equal")
    figure.tight_layout()
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
