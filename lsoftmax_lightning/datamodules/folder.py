"""Datamodules of image folders: classes of your own, and images to predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from ..checkpoints import read, saved_data_spec
from ..data_spec import DataSpec
from ..errors import DataError
from .base import Images, stratified_split
from .files import FileDataModule, Files, class_folders, list_files
from .subsets import check_val_size


class ImageFolderDataModule(FileDataModule):
    """Images in ``train/<class>/*``, ``test/<class>/*`` and, optionally, ``val/<class>/*``.

    Without ``val``, the validation images are split off ``train``. All splits must have the same class folders, each
    with at least one image. All files must be images; hidden files are ignored.

    Args:
        root: Folder that contains ``train`` and ``test``.
        image_size: Side of square images, or height and width. Images are scaled to cover this size and their centre is
            cropped.
        val_size: Number of training images held out for validation, or a fraction below 1. It is ignored if ``val``
            exists.
        split_seed: Seed of the validation split.
        **kwargs: Arguments of :class:`FileDataModule`.

    Raises:
        DataError: If the folders do not have this layout.
        InputError: If a setting is out of range.
    """

    def __init__(
        self,
        root: str,
        image_size: int | tuple[int, int],
        val_size: int | float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, **kwargs)
        self.val_size = check_val_size(val_size)
        self.split_seed = split_seed
        self.root = Path(root)
        self.class_names = tuple(folder.name for folder in class_folders(self.root / "train"))
        if len(self.class_names) < 2:
            raise DataError(
                f"{self.root / 'train'}: must contain at least two class folders, got {self.class_names}; add a class."
            )
        splits = ("train", "val", "test") if (self.root / "val").exists() else ("train", "test")
        self.files = {split: self._list_split(split) for split in splits}

    def _list_split(self, split: str) -> Files:
        folders = class_folders(self.root / split)
        names = {folder.name for folder in folders}
        if names != set(self.class_names):
            raise DataError(
                f"{self.root / split}: must have the class folders of {self.root / 'train'}; "
                f"missing: {sorted(set(self.class_names) - names)}, too many: {sorted(names - set(self.class_names))}."
            )
        return list_files(folders)

    def load_train_val(self) -> tuple[Images, Images]:
        """Read the images of all splits, including test, to report all unreadable files before training."""
        train = self.files["train"]
        if "val" in self.files:
            splits = [train, self.files["val"]]
        else:
            splits = [
                Files([train.paths[i] for i in index], [train.targets[i] for i in index])
                for index in stratified_split(torch.tensor(train.targets), self.val_size, self.split_seed)
            ]
        self._check_train_size(splits[0].targets)
        train_data, val_data, test_data = self.read(*splits, self.files["test"])
        self.test_data = self._checked(test_data)
        return train_data, val_data

    @override
    def load_test(self) -> Images:
        (test_data,) = self.read(self.files["test"])
        return test_data


class PredictFolderDataModule(FileDataModule):
    """Images to predict, without the training data.

    The command ``predict`` with ``predict_folder`` uses it in place of the other datamodules of image files.

    Args:
        checkpoint: Checkpoint of the network, which contains the class names.
        predict_folder: Folder of images. Images in its subfolders are included.
        image_size: Side of square images, or height and width. Images are scaled to cover this size and their centre is
            cropped.
        **kwargs: Arguments of :class:`FileDataModule`. A prediction fails if ``image_size``, ``mean`` or ``std``
            differs from the checkpoint.

    Raises:
        InputError: If a setting is out of range, or the checkpoint contains no class names.
    """

    def __init__(
        self, checkpoint: str, predict_folder: str | None, image_size: int | tuple[int, int], **kwargs: Any
    ) -> None:
        super().__init__(image_size, predict_folder=predict_folder, **kwargs)
        spec = saved_data_spec(read(checkpoint)) or DataSpec()
        spec.require("class_names")
        self.class_names = spec.class_names

    def load_train_val(self) -> tuple[Images, Images]:
        """Raise a DataError, since there are only images to predict."""
        raise DataError("PredictFolderDataModule: has only images to predict; use the datamodule of the training run.")

    def load_test(self) -> Images:
        """Raise a DataError, since there are only images to predict."""
        return self.load_train_val()[0]
