"""Base classes of the datamodules: split, loaders, and augmentation and normalisation on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..errors import DataError, InputError
from ..pairs import pairs_of
from ..seeds import global_seed
from ..transforms import Augmentation, Normalize, RandomCropFlip
from .images import ImageFiles, ImageStore, ImageSubset, files_in, select
from .loader import DRAW_SCALE, BatchLoader, GlobalBatchSampler, seeded_generator
from .subsets import check_size, check_val_size, random_labels, stratified_subset, subset_length

UNKNOWN_CLASS = -1
"""Class of an image without a label."""


class Images(NamedTuple):
    """Images and their classes."""

    images: ImageStore
    """Images, uint8, ``(N, C, H, W)``."""
    targets: Tensor
    """Class of each image, int64, ``(N,)``."""


def stratified_split(targets: Tensor, val_size: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images into training and validation images, stratified by class.

    Args:
        targets: Class of each image, ``(N,)``.
        val_size: Number of validation images, or a fraction below 1.
        seed: Seed of the split.

    Returns:
        Indices of the training images and indices of the validation images.

    Raises:
        InputError: If a class would have no training or no validation image.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"split_seed: must be from 0 to {2**32 - 1}, got {seed}; use 0.")
    # imported here, because it is slow and help and --print_config do not need it
    from sklearn.model_selection import train_test_split

    try:
        train, val = train_test_split(
            torch.arange(len(targets)), test_size=val_size, stratify=targets, random_state=seed
        )
    except ValueError as error:
        raise InputError(
            f"val_size: must leave training and validation images of every class, got {val_size} for {len(targets)} "
            f"images: {error}"
        ) from error
    return train, val


class BatchDataModule(LightningDataModule):
    """Datamodule of uint8 images that are loaded in batches and augmented and normalised on the device.

    A subclass defines ``class_names``, ``image_shape``, ``mean`` and ``std`` on the class or before it calls this
    ``__init__``, and implements :meth:`load_train_val` and :meth:`load_test`. It may download files in
    ``prepare_data``.

    Args:
        batch_size: Global batch size. With four devices, each processes a quarter of a batch. Training drops an
            incomplete last batch.
        crop_padding: Pixels of black padding around a training image, which is then cropped back to its size at a
            random position. 0 disables the crop.
        flip: Whether to mirror half of the training images left to right.
        predict_folder: Folder of images to predict instead of the test images. Images in its subfolders are included.
            They are scaled to cover ``image_shape`` and their centre is cropped.
        train_size: Number of training images to keep, stratified by class, as an integer, or a fraction of the images
            left after the validation split, as a float. Subsets with the same seed are nested. None keeps all images.
        label_noise: Fraction of the training labels, after ``train_size``, to replace by labels drawn uniformly over
            all classes. A drawn label may equal the one it replaces. Validation and test labels do not change.
        train_seed: Seed of the subset and of the label noise. None uses the seed of ``seed_everything``, so that runs
            with the same seed train on the same images and labels.
        device_memory_gib: Largest size in GiB of a set of images (training, validation or test) that is kept on the
            GPU, as uint8. CIFAR-10 takes 0.15. 0 keeps all images in host memory.

    Attributes:
        class_names: Name of each class.
        image_shape: Channels, height and width.
        mean: Mean of each channel over the training images, in 0 .. 1.
        std: Standard deviation of each channel over the training images, in 0 .. 1.
        resize: How images of other sizes are resized to ``image_shape``. ``cover`` scales an image to cover this size
            and crops its centre.
        num_workers: Number of processes that read batches of images that are not in memory. The default is the number
            of torch's threads, at most 8.
        augment: Augmentation of the training images, or None. A subclass may set any
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
        train_size: int | float | None = None,
        label_noise: float = 0.0,
        train_seed: int | None = None,
        device_memory_gib: float = 4.0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size: must be at least 1, got {batch_size}; the paper uses 256.")
        side = min(self.image_shape[1:])
        if not 0 <= crop_padding < side:  # otherwise some crops are black, and padded images fill the memory
            raise InputError(
                f"crop_padding: must be from 0 to {side - 1} pixels, below the shorter side of the image, got "
                f"{crop_padding}; the paper uses 4 for images of 32 pixels."
            )
        channels = self.image_shape[0]
        if not {len(self.mean), len(self.std)} <= {1, channels}:
            raise InputError(
                f"mean and std: must have a value for each of the {channels} channels, or one, got {self.mean} and "
                f"{self.std}."
            )
        if not (all(0 <= value <= 1 for value in self.mean) and all(0 < value <= 1 for value in self.std)):
            raise InputError(
                f"mean and std: must be within 0 .. 1, with std above 0, got {self.mean} and {self.std}; divide values "
                "for 0 .. 255 by 255."
            )
        if not 0 <= label_noise <= 1:
            raise InputError(
                f"label_noise: must be a fraction from 0 to 1, got {label_noise}; use 0.2 to replace a fifth of the "
                "training labels."
            )
        if not device_memory_gib >= 0:
            raise InputError(f"device_memory_gib: must be at least 0, got {device_memory_gib}; use 0 for host memory.")
        self.batch_size = batch_size
        self.device_memory_gib = device_memory_gib
        self.predict_folder = predict_folder
        self.train_size = None if train_size is None else check_size("train_size", train_size)
        self.label_noise = label_noise
        self.train_seed = train_seed
        self._train_summary = ""
        self._train_settings: tuple[int | float | None, float, int | None] | None = None
        if not hasattr(self, "num_workers"):
            self.num_workers = min(8, torch.get_num_threads())
        self.augment = RandomCropFlip(crop_padding, flip) if crop_padding or flip else None
        self.normalize = Normalize(self.mean, self.std)

    @property
    def batch_size(self) -> int:
        """Global batch size, at most the number of training images once they are read."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        # Lightning's BatchSizeFinder sets it to more than the number of images
        limit = len(self.train_data.targets) if hasattr(self, "train_data") else batch_size
        if batch_size > limit:
            rank_zero_warn(f"The batch size is lowered from {batch_size} to {limit}, the number of training images.")
        self._batch_size = min(batch_size, limit)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    @abstractmethod
    def load_train_val(self) -> tuple[Images, Images]:
        """Read the training and the validation images.

        Raises:
            DataError: If they are missing or damaged.
        """

    @abstractmethod
    def load_test(self) -> Images:
        """Read the test images.

        Raises:
            DataError: If they are missing or damaged.
        """

    def setup(self, stage: str) -> None:
        """Read the images of a stage, unless they were read before.

        The subset of ``train_size`` and the labels of ``label_noise`` are drawn again if these settings or the seed
        have changed.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        if stage in ("fit", "validate") and not hasattr(self, "train_data"):
            train_data, self.val_data = self.load_train_val()
            self.train_data = self._all_train_data = self._checked(train_data)
            if pairs_of(self, "val") is None:
                self.val_data = self._checked(self.val_data)
        if stage in ("fit", "validate") and hasattr(self, "_all_train_data"):  # not if train_data was set by hand
            self._apply_train_settings(self._all_train_data)
        if stage == "fit" and self._train_summary:
            rank_zero_info(self._train_summary)
        if stage == "predict" and self.predict_folder is not None:
            self.predict_data = self.load_predict(files_in(self.predict_folder))
            return
        if stage in ("test", "predict") and not hasattr(self, "test_data"):
            self.test_data = self.load_test()
            if pairs_of(self, "test") is None:
                self.test_data = self._checked(self.test_data)
        if stage == "predict":
            self.predict_data = self.test_data

    def load_predict(self, paths: list[str]) -> Images:
        """Return the images of ``predict_folder``, with class -1 for unknown."""
        return Images(ImageFiles(paths, self.image_shape), torch.full((len(paths),), UNKNOWN_CLASS))

    def _apply_train_settings(self, data: Images) -> None:
        """Set ``train_data`` to the subset and the labels of ``train_size``, ``label_noise`` and the seed."""
        seed = (global_seed() or 0) if self.train_seed is None else self.train_seed
        is_changed = self.train_size is not None or self.label_noise > 0
        settings = (self.train_size, self.label_noise, seed if is_changed else None)
        if settings == self._train_settings:
            return
        self._train_settings = settings
        self._train_summary = ""
        self.train_data = data
        if not is_changed:
            return
        images, targets = data
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
        self.train_data = Images(images, targets)

    def _check_train_size(self, targets: Sequence[int]) -> None:
        """Check ``train_size`` before the images are read."""
        if self.train_size is not None:
            subset_length(torch.tensor(targets), self.train_size)

    def _checked(self, data: Images) -> Images:
        """Return the data, with int64 labels, if images and labels are valid; raise a DataError otherwise."""
        name = type(self).__name__
        images, targets = data
        if len(images) != len(targets) or len(targets) == 0:
            raise DataError(
                f"{name}: must load as many images as labels, and at least one, got {len(images)} images and "
                f"{len(targets)} labels; check the files."
            )
        if targets.ndim != 1 or targets.is_floating_point():
            raise DataError(
                f"{name}: labels must be integers of shape (N,), got {targets.dtype} of shape {tuple(targets.shape)}; "
                "convert them."
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"{name}: labels must be 0 to {self.num_classes - 1} for its {self.num_classes} classes, got {low} to "
                f"{high}; check labels and class_names."
            )
        if isinstance(images, Tensor):
            if images.shape[1:] != tuple(self.image_shape):
                raise DataError(
                    f"{name}: images must have the shape {tuple(self.image_shape)}, got {tuple(images.shape[1:])}; "
                    "check images and image_shape."
                )
            if not images.is_floating_point() and images.dtype != torch.uint8:
                raise DataError(
                    f"{name}: images must be uint8, or floats from 0 to 1, got {images.dtype}; convert them."
                )
            if images.is_floating_point() and not (images.min() >= 0 and images.max() <= 1):
                raise DataError(
                    f"{name}: images must be uint8, or floats from 0 to 1, got {images.dtype} from {images.min():.4g} "
                    f"to {images.max():.4g}; divide values for 0 .. 255 by 255."
                )
        return Images(images, targets.long())

    def train_dataloader(self) -> BatchLoader:
        """Return shuffled batches (uint8 images, classes), with draws if there is an augmentation."""
        overfit = self.trainer and self.trainer.overfit_batches  # type: ignore[attr-defined]
        num_draws = self.augment.num_draws if self.augment else None
        return self._loader(self.train_data, shuffle=not overfit, drop_last=True, num_draws=num_draws)

    def val_dataloader(self) -> BatchLoader:
        """Return batches (uint8 images, classes) in order."""
        return self._loader(self.val_data)

    def test_dataloader(self) -> BatchLoader:
        """Return batches (uint8 images, classes) in order."""
        return self._loader(self.test_data)

    def predict_dataloader(self) -> BatchLoader:
        """Return batches of the images of ``predict_folder``, or of the test images, in order."""
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
        device_memory = self.device_memory_gib * 2**30
        loader = BatchLoader(data.images, data.targets, sampler, num_draws, num_workers, device, device_memory)
        if not (trainer and trainer.overfit_batches):  # type: ignore[attr-defined]
            loader.dataset = data.targets  # with overfit_batches, Lightning would build another loader from it
        return loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training images and normalise all images, on the device."""
        images, targets, *draws = batch
        if self.augment and draws:
            images = self.augment(images, draws[0].to(torch.float32).div_(DRAW_SCALE))
        images = self.normalize(images)
        # the Trainer applied its precision, such as bf16-true, while the images were uint8
        return self.trainer.precision_plugin.convert_input(images) if self.trainer else images, targets


class ImageDataModule(BatchDataModule):
    """Datamodule of training and test images, with validation images split off the training images.

    A subclass defines the attributes of :class:`BatchDataModule` and implements :meth:`load`.

    Args:
        batch_size: Global batch size, as in :class:`BatchDataModule`.
        val_size: Number of training images held out for validation, stratified by class, or a fraction below 1. The
            paper uses a tenth (section 5).
        split_seed: Seed of the validation split. It does not depend on ``seed_everything``, so all runs validate on the
            same images.
        **kwargs: Arguments of :class:`BatchDataModule`: ``crop_padding``, ``flip``, ``predict_folder``, ``train_size``,
            ``label_noise``, ``train_seed``.

    Raises:
        InputError: If a setting is out of range.
    """

    def __init__(self, batch_size: int = 256, val_size: int | float = 0.1, split_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(batch_size, **kwargs)
        self.val_size = check_val_size(val_size)
        self.split_seed = split_seed

    @abstractmethod
    def load(self, train: bool) -> Images:
        """Read the training or the test images.

        Args:
            train: Whether to read the training images.

        Raises:
            DataError: If they are missing or damaged.
        """

    def load_train_val(self) -> tuple[Images, Images]:
        """Read the training images and split them.

        Raises:
            DataError: If they are missing or damaged.
            InputError: If a class would have no training or no validation image.
        """
        images, targets = self._checked(self.load(train=True))
        train, val = stratified_split(targets, self.val_size, self.split_seed)
        return Images(images[train], targets[train]), Images(images[val], targets[val])

    @override
    def load_test(self) -> Images:
        return self.load(train=False)
