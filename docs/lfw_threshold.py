"""Test models on fold 10 of LFW with the threshold of a held-out fold, and with that of the training folds.

Usage: python docs/lfw_threshold.py ROOT CHECKPOINT [CHECKPOINT ...]
"""

from __future__ import annotations

import sys

import torch

from lsoftmax_lightning import VerificationModule
from lsoftmax_lightning.datamodules import LFWFoldDataModule
from lsoftmax_lightning.metrics import PairVerification


def main(root: str, *checkpoints: str) -> None:
    """Print a line for each checkpoint and each choice of folds to fit the threshold on."""
    data = LFWFoldDataModule(root, image_size=(56, 48))
    for folds in (range(9, 10), range(1, 9)):
        fitted = [pair._replace(fold=0) for pair in data.pairs if pair.fold in folds]
        files, pairs = data.index_images([*fitted, *(pair for pair in data.pairs if pair.fold == 10)])
        (faces,) = data.read(files)
        for path in checkpoints:
            model = VerificationModule.load_from_checkpoint(path, map_location="cpu").eval()
            metric = PairVerification(pairs)
            for image_ids in faces.targets.split(256):
                metric.update(model.embed(data.normalize(faces.images[image_ids])), image_ids)
            print(f"{path}: {metric.compute()['acc']:.2%} with the threshold of folds {folds[0]} to {folds[-1]}")


if __name__ == "__main__":
    with torch.inference_mode():
        main(*sys.argv[1:])
