"""scikit-learn's handwritten digits: real data that needs no download."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from .base import ImageDataModule, Images


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits of 8x8 pixels, bundled with scikit-learn.

    The source names no test set; ours is a fifth of the images, stratified and always the same.

    Args:
        batch_size: Global batch size in training.
        val_size: Training images held out for validation: a number, or a share below 1.
        split_seed: Seed of the validation split.
        **kwargs: As :class:`ImageDataModule`.
    """

    class_names = tuple("0123456789")
    image_shape = (1, 8, 8)
    mean = (0.305,)
    std = (0.376,)

    def __init__(self, batch_size: int = 64, val_size: float = 0.1, split_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(batch_size, val_size, split_seed, **kwargs)

    def load(self, train: bool) -> Images:
        """The training or the test images."""
        digits = load_digits()
        images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
        targets = torch.from_numpy(digits.target).long()
        parts = train_test_split(torch.arange(len(targets)), test_size=0.2, stratify=targets, random_state=0)
        index = parts[0 if train else 1]
        return Images(images[index], targets[index])
