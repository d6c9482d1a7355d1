"""What the datamodules share: split, loaders, normalisation on the device."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from lightning import LightningDataModule
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms import v2

from ..errors import DataError, InputError
from .loader import BatchLoader, BatchSampler


class Images(NamedTuple):
    """Images, uint8 [N, channels, height, width], and their classes, int64 [N]."""

    images: Tensor
    targets: Tensor


class ImageDataModule(LightningDataModule):
    """Images that fit in memory, served by the batch as uint8 and normalised on the device.

    A subclass states the class attributes and :meth:`load`, and a download in ``prepare_data``.

    Args:
        batch_size: Global batch size in training: with four devices each takes a quarter. Training leaves out a last
            batch that is not whole.
        val_size: Training images held out for validation, stratified by class: a number, or a share below 1. The
            paper's choice is a tenth (section 5).
        split_seed: Seed of that split; it does not follow ``seed_everything``, so that every run validates on the
            same images.

    Attributes:
        class_names: Name of each class.
        image_shape: Channels, height and width.
        mean: Mean of each channel over the training images, in 0 .. 1.
        std: Likewise the standard deviation.

    Raises:
        InputError: If a setting is out of range.
    """

    class_names: ClassVar[tuple[str, ...]]
    image_shape: ClassVar[tuple[int, int, int]]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __init__(self, batch_size: int = 256, val_size: float = 0.1, split_seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        if not (0 < val_size < 1 or (val_size >= 1 and val_size == int(val_size))):
            raise InputError(f"val_size must be a share between 0 and 1 or a number of images, got {val_size}.")
        self.batch_size = batch_size
        self.val_size = val_size if val_size < 1 else int(val_size)
        self.split_seed = split_seed
        self.normalize = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
        )

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @abstractmethod
    def load(self, train: bool) -> Images:
        """Reads the training or the test images.

        Raises:
            DataError: If they are missing or damaged.
        """

    def setup(self, stage: str) -> None:
        """Reads and splits, once; ``stage`` is that of the Trainer."""
        if stage in ("fit", "validate") and not hasattr(self, "train_data"):
            images, targets = self._checked(self.load(train=True))
            try:
                train, val = train_test_split(
                    torch.arange(len(targets)),
                    test_size=self.val_size,
                    stratify=targets,
                    random_state=self.split_seed,
                )
            except ValueError as error:
                raise InputError(f"val_size {self.val_size} does not split {len(targets)} images: {error}") from error
            self.train_data = Images(images[train], targets[train])
            self.val_data = Images(images[val], targets[val])
        if stage in ("test", "predict") and not hasattr(self, "test_data"):
            self.test_data = self._checked(self.load(train=False))

    def _checked(self, data: Images) -> Images:
        if len(data.images) != len(data.targets) or len(data.targets) == 0:
            raise DataError(
                f"{type(self).__name__} read {len(data.images)} images and {len(data.targets)} labels; it takes as "
                "many of the one as of the other, and at least one."
            )
        low, high = int(data.targets.min()), int(data.targets.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"{type(self).__name__} has {self.num_classes} classes, so labels 0 to {self.num_classes - 1}, but "
                f"labels {low} to {high} were read."
            )
        return data

    def train_dataloader(self) -> BatchLoader:
        """Shuffled batches of (uint8 images, classes)."""
        overfit = self.trainer and self.trainer.overfit_batches  # type: ignore[attr-defined]
        return self._loader(self.train_data, shuffle=not overfit, drop_last=True)

    def val_dataloader(self) -> BatchLoader:
        """Batches of (uint8 images, classes), in order."""
        return self._loader(self.val_data)

    def test_dataloader(self) -> BatchLoader:
        """Batches of (uint8 images, classes), in order."""
        return self._loader(self.test_data)

    def predict_dataloader(self) -> BatchLoader:
        """The test images, in order."""
        return self._loader(self.test_data)

    def _loader(self, data: Images, shuffle: bool = False, drop_last: bool = False) -> BatchLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        # the seed of seed_everything, as the Trainer takes it for its own samplers
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        sampler = BatchSampler(len(data.targets), self.batch_size, shuffle, drop_last, rank, world_size, seed)
        return BatchLoader(data.images, data.targets, sampler)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalises the images, on the device."""
        images, targets = batch
        images = self.normalize(images)
        # the Trainer's precision (bf16-true, say) was applied before the images were floats
        return self.trainer.precision_plugin.convert_input(images) if self.trainer else images, targets
