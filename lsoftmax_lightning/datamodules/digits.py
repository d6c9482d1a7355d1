"""scikit-learn's handwritten digits: real data without a download."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from .base import ImageDataModule, Images


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits of 8x8 pixels, bundled with scikit-learn.

    scikit-learn defines no test set. This datamodule tests on a fixed, stratified fifth of the images.

    Args:
        batch_size: Global batch size.
        val_size: Number of training images held out for validation, or a fraction below 1.
        split_seed: Seed of the validation split.
        **kwargs: Arguments of :class:`ImageDataModule`.
    """

    class_names = tuple("0123456789")
    image_shape = (1, 8, 8)
    mean = (0.305,)
    std = (0.376,)

    def __init__(self, batch_size: int = 64, val_size: int | float = 0.1, split_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(batch_size, val_size, split_seed, **kwargs)

    @override
    def load(self, train: bool) -> Images:
        from sklearn.datasets import load_digits  # a slow import
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
        targets = torch.from_numpy(digits.target).long()
        splits = train_test_split(torch.arange(len(targets)), test_size=0.2, stratify=targets, random_state=0)
        index = splits[0 if train else 1]
        return Images(images[index], targets[index])
