"""What the datamodules share: split, loaders, augmentation and normalisation on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..errors import DataError, InputError
from ..seeds import global_seed
from ..transforms import Augmentation, Normalize, RandomCropFlip
from .images import ImageFiles, ImageStore, ImageSubset, files_in, select
from .loader import DRAW_SCALE, BatchLoader, GlobalBatchSampler, seeded_generator
from .subsets import check_size, random_labels, stratified_subset, subset_length


class Images(NamedTuple):
    """Images, uint8 [N, channels, height, width], and their classes, int64 [N]."""

    images: ImageStore
    targets: Tensor


def stratified_split(targets: Tensor, val_size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those to validate on, with the classes in proportion.

    Args:
        targets: The classes, [N].
        val_size: How many images to validate on: a number, or a share below 1.
        seed: Of the split.

    Raises:
        InputError: If a class is left out of a part.
    """
    try:
        train, val = train_test_split(
            torch.arange(len(targets)), test_size=val_size, stratify=targets, random_state=seed
        )
    except ValueError as error:
        raise InputError(f"val_size {val_size} does not split {len(targets)} images: {error}") from error
    return train, val


class BatchDataModule(LightningDataModule):
    """Images served by the batch as uint8, augmented and normalised on the device.

    A subclass states the attributes below but ``augment``, on the class or before it calls this ``__init__``;
    :meth:`load_train_val` and :meth:`load_test`; and a download in ``prepare_data``.

    Args:
        batch_size: Global batch size in training: with four devices each takes a quarter. Training leaves out a last
            batch that is not whole.
        crop_padding: In training, pixels of black around an image, which is then cropped back at a random place.
        flip: In training, whether half of the images are mirrored left and right.
        predict_folder: Folder of images to predict, in folders or not, in the place of the test images. Each is scaled
            to cover ``image_shape`` and its middle cut out.
        train_size: Training images to keep, stratified by class: a number, or a fraction below 1 of those left after
            the validation split. Subsets of one seed are nested. None keeps all images.
        label_noise: Fraction of the training labels, after ``train_size``, that are replaced by labels drawn uniformly
            over all classes. A drawn label may equal the one it replaces. Validation and test labels do not change.
        train_seed: Seed of the subset and of the label noise. None uses the seed of ``seed_everything``, so that runs
            with one seed train on the same images and labels.
        device_memory_gib: Images in memory are kept on the GPU, uint8, where a set of them (training, validation, test)
            takes no more than this, in GiB: CIFAR-10 takes 0.15. 0 keeps them in the memory of the host.

    Attributes:
        class_names: Name of each class.
        image_shape: Channels, height and width.
        mean: Mean of each channel over the training images, in 0 .. 1.
        std: Likewise the standard deviation.
        resize: How an image of another size gets ``image_shape``: ``cover``, it is scaled to cover this size and its
            middle cut out.
        num_workers: Processes that read batches of images that are not in memory; by default one for each of torch's
            threads, up to 8.
        augment: What training does to uint8 images on the device, or None; a subclass may set any
            :class:`~lsoftmax_lightning.transforms.Augmentation`.

    Raises:
        InputError: If a setting is out of range.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize = "cover"
    num_workers: int
    augment: Augmentation | None

    def __init__(
        self,
        batch_size: int = 256,
        crop_padding: int = 0,
        flip: bool = False,
        predict_folder: str | None = None,
        train_size: float | None = None,
        label_noise: float = 0.0,
        train_seed: int | None = None,
        device_memory_gib: float = 4.0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        if crop_padding > 0 and crop_padding > max(
            self.image_shape[1:]
        ):  # some crops would be black, and padded images fill the memory
            raise InputError(
                f"crop_padding: must be at most the image's side of {max(self.image_shape[1:])} pixels, got "
                f"{crop_padding}; the paper uses 4 for images of 32 pixels."
            )
        if not 0 <= label_noise <= 1:
            raise InputError(
                f"label_noise: must be a fraction from 0 to 1, got {label_noise}; use 0.2 to replace a fifth of the "
                "training labels."
            )
        if not device_memory_gib >= 0:
            raise InputError(f"device_memory_gib: must be 0 or more, got {device_memory_gib}.")
        self.batch_size = batch_size
        self.device_memory_gib = device_memory_gib
        self.predict_folder = predict_folder
        self.train_size = None if train_size is None else check_size("train_size", train_size)
        self.label_noise = label_noise
        self.train_seed = train_seed
        self._train_summary = ""
        if not hasattr(self, "num_workers"):
            self.num_workers = min(8, torch.get_num_threads())
        self.augment = RandomCropFlip(crop_padding, flip) if crop_padding or flip else None
        self.normalize = Normalize(self.mean, self.std)

    @property
    def batch_size(self) -> int:
        """Global batch size in training; once the images are read, a larger one is reduced to their number."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        # set again by Lightning's BatchSizeFinder, which doubles it beyond the data
        most = len(self.train_data.targets) if hasattr(self, "train_data") else batch_size
        if batch_size > most:
            rank_zero_info(f"batch_size: must be at most the {most} training images, got {batch_size}; {most} is used.")
        self._batch_size = min(batch_size, most)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @abstractmethod
    def load_train_val(self) -> tuple[Images, Images]:
        """Reads the images to train on and those to validate on.

        Raises:
            DataError: If they are missing or damaged.
        """

    @abstractmethod
    def load_test(self) -> Images:
        """Reads the test images.

        Raises:
            DataError: If they are missing or damaged.
        """

    def setup(self, stage: str) -> None:
        """Reads, once; ``stage`` is that of the Trainer."""
        if stage in ("fit", "validate") and not hasattr(self, "train_data"):
            train_data, self.val_data = self.load_train_val()
            self.train_data = self._apply_train_settings(train_data)
        if stage == "fit" and self._train_summary:
            rank_zero_info(self._train_summary)
        if stage == "predict" and self.predict_folder is not None:
            paths = files_in(self.predict_folder)
            unknown = torch.zeros(len(paths), dtype=torch.int64)
            self.predict_data = Images(ImageFiles(paths, self.image_shape), unknown)
            return
        if stage in ("test", "predict") and not hasattr(self, "test_data"):
            self.test_data = self.load_test()
        if stage == "predict":
            self.predict_data = self.test_data

    def _apply_train_settings(self, data: Images) -> Images:
        """Apply ``train_size`` and ``label_noise``."""
        if self.train_size is None and not self.label_noise:
            return data
        images, targets = data
        seed = (global_seed() or 0) if self.train_seed is None else self.train_seed
        if self.train_size is not None:
            length = subset_length(targets, self.train_size)
            index = stratified_subset(targets, length, seeded_generator(f"{seed} train_size"))
            images, targets = select(images, index), targets[index]
        self._train_summary = f"Training on {len(targets):,} of {len(data.targets):,} images"
        if self.label_noise:
            count = round(self.label_noise * len(targets))
            targets = random_labels(targets, count, self.num_classes, seeded_generator(f"{seed} label_noise"))
            self._train_summary += (
                f"; {count:,} of {len(targets):,} training labels drawn at random (label_noise {self.label_noise:g})"
            )
        self._train_summary += f"; seed {seed}."
        return Images(images, targets)

    def _check_train_size(self, targets: Sequence[int]) -> None:
        """Check ``train_size`` before the images are read."""
        if self.train_size is not None:
            subset_length(torch.tensor(targets), self.train_size)

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
        """Shuffled batches of (uint8 images, classes), with draws where the images are to be augmented."""
        overfit = self.trainer and self.trainer.overfit_batches  # type: ignore[attr-defined]
        num_draws = self.augment.num_draws if self.augment else None
        return self._loader(self.train_data, shuffle=not overfit, drop_last=True, num_draws=num_draws)

    def val_dataloader(self) -> BatchLoader:
        """Batches of (uint8 images, classes), in order."""
        return self._loader(self.val_data)

    def test_dataloader(self) -> BatchLoader:
        """Batches of (uint8 images, classes), in order."""
        return self._loader(self.test_data)

    def predict_dataloader(self) -> BatchLoader:
        """The images of ``predict_folder``, or the test images, in order."""
        return self._loader(self.predict_data)

    def _loader(
        self, data: Images, shuffle: bool = False, drop_last: bool = False, num_draws: int | None = None
    ) -> BatchLoader:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        seed = global_seed() or 0
        sampler = GlobalBatchSampler(len(data.targets), self.batch_size, shuffle, drop_last, rank, world_size, seed)
        store = data.images.store if isinstance(data.images, ImageSubset) else data.images
        num_workers = 0 if isinstance(store, Tensor) else self.num_workers
        memory = self.device_memory_gib * 2**30
        loader = BatchLoader(data.images, data.targets, sampler, num_draws, num_workers, device, memory)
        if not (trainer and trainer.overfit_batches):  # type: ignore[attr-defined]
            loader.dataset = data.targets  # to overfit, Lightning would make another loader of it
        return loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments training images and normalises all, on the device."""
        images, targets, *draws = batch
        if self.augment and draws:
            images = self.augment(images, draws[0].to(torch.float32).div_(DRAW_SCALE))
        images = self.normalize(images)
        # the Trainer's precision (bf16-true, say) was applied before the images were floats
        return self.trainer.precision_plugin.convert_input(images) if self.trainer else images, targets


class ImageDataModule(BatchDataModule):
    """A set of training images, from which those for validation are split off, and one of test images.

    A subclass states the attributes of :class:`BatchDataModule`, and :meth:`load`.

    Args:
        batch_size: As :class:`BatchDataModule`.
        val_size: Training images held out for validation, stratified by class: a number, or a share below 1. The
            paper's choice is a tenth (section 5).
        split_seed: Seed of that split; it does not follow ``seed_everything``, so that every run validates on the
            same images.
        **kwargs: As :class:`BatchDataModule`: ``crop_padding``, ``flip``, ``predict_folder``, ``train_size``,
            ``label_noise``, ``train_seed``.

    Raises:
        InputError: If a setting is out of range.
    """

    def __init__(self, batch_size: int = 256, val_size: float = 0.1, split_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(batch_size, **kwargs)
        self.val_size = check_size("val_size", val_size)
        self.split_seed = split_seed

    @abstractmethod
    def load(self, train: bool) -> Images:
        """Reads the training or the test images.

        Raises:
            DataError: If they are missing or damaged.
        """

    def load_train_val(self) -> tuple[Images, Images]:
        """Reads the training images and splits them.

        Raises:
            DataError: If they are missing or damaged.
            InputError: If ``val_size`` does not split them.
        """
        images, targets = self._checked(self.load(train=True))
        train, val = stratified_split(targets, self.val_size, self.split_seed)
        return Images(images[train], targets[train]), Images(images[val], targets[val])

    def load_test(self) -> Images:
        """Reads the test images.

        Raises:
            DataError: If they are missing or damaged.
        """
        return self._checked(self.load(train=False))
