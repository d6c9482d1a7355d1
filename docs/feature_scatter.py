"""Draws the MNIST test features of 2-D models side by side: the poster's figure.

Usage: python docs/feature_scatter.py OUTPUT.png ROOT CHECKPOINT [CHECKPOINT ...]
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
from angles import embed_test_set

from lsoftmax_lightning.datamodules import MNISTDataModule
from lsoftmax_lightning.functional import target_angles
from lsoftmax_lightning.pictures import feature_scatter, plane


def main(output: str, root: str, *checkpoints: str) -> None:
    """Draws one panel for each checkpoint."""
    data = MNISTDataModule(root=root)
    figure, axes = plt.subplots(1, len(checkpoints), figsize=(5 * len(checkpoints), 5), squeeze=False)
    for axis, path in zip(axes[0], checkpoints, strict=True):
        model, features, targets = embed_test_set(path, data)
        accuracy = (model.head(features).argmax(1) == targets).float().mean()
        angle = target_angles(features, model.head.weight[targets]).mean()
        title = f"m = {model.head.margin}: test accuracy {accuracy:.2%}, mean angle to class {angle:.1f}°"
        feature_scatter(*plane(features, model.head.weight), targets, data.class_names, title, axis)
    figure.tight_layout()
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
