"""Draws the test features of 2-D models side by side: the poster's figure.

Usage: python docs/feature_scatter.py OUTPUT.png ROOT CHECKPOINT [CHECKPOINT ...]
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.datamodules import MNISTDataModule


def main(output: str, root: str, *checkpoints: str) -> None:
    """Draws one panel for each checkpoint."""
    data = MNISTDataModule(root=root)
    data.setup("test")
    figure, axes = plt.subplots(1, len(checkpoints), figsize=(5 * len(checkpoints), 5), squeeze=False)
    for axis, path in zip(axes[0], checkpoints, strict=True):
        model = ClassificationModule.load_from_checkpoint(path, map_location="cpu").eval()
        with torch.inference_mode():
            batches = [model.embed(data.normalize(images)) for images, _ in data.test_dataloader()]
        features, targets = torch.cat(batches), data.test_data.targets
        accuracy = (model.head(features).argmax(1) == targets).float().mean()
        cosine = torch.cosine_similarity(features, model.head.weight[targets])
        angle = cosine.clamp(-1, 1).arccos().rad2deg().mean()
        axis.scatter(*features.T.numpy(), c=targets, s=2, cmap="tab10", linewidths=0, rasterized=True)
        reach = features.norm(dim=1).quantile(0.99).item()
        for name, weight in zip(data.class_names, model.head.weight.detach().numpy(), strict=True):
            direction = weight / np.linalg.norm(weight) * reach
            axis.plot([0, direction[0]], [0, direction[1]], color="black", linewidth=0.6)
            axis.annotate(name, 1.08 * direction, ha="center", va="center")
        axis.set_title(f"m = {model.head.margin}: test accuracy {accuracy:.2%}, mean angle to class {angle:.1f}°")
        axis.set_aspect("equal")
    figure.tight_layout()
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
