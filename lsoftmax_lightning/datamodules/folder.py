"""Your own images, a folder for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoints import read, saved_data_spec
from ..data_spec import DataSpec
from ..errors import DataError
from .base import Images, stratified_split
from .files import FileDataModule, Files, class_folders, list_files
from .subsets import check_size


class ImageFolderDataModule(FileDataModule):
    """Images in ``train/<class>/*`` and ``test/<class>/*``, and in ``val/<class>/*`` if there is such a folder.

    Without ``val`` the validation images are split off ``train``. Each part has the same class folders, and each of
    these an image at least. Everything but hidden files is taken for an image.

    Args:
        root: The folder that holds ``train`` and ``test``.
        image_size: Side of the square images, or height and width. An image is scaled to cover that and its middle cut
            out.
        val_size: Training images to validate on, where there is no ``val``: a number, or a share below 1.
        split_seed: Seed of that split.
        **kwargs: As :class:`FileDataModule`.

    Raises:
        DataError: If the folders are not laid out so.
        InputError: If a setting is out of range.
    """

    def __init__(
        self,
        root: str,
        image_size: int | tuple[int, int],
        val_size: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, **kwargs)
        self.val_size = check_size("val_size", val_size)
        self.split_seed = split_seed
        self.root = Path(root)
        self.class_names = tuple(folder.name for folder in class_folders(self.root / "train"))
        if len(self.class_names) < 2:
            raise DataError(f"{self.root / 'train'} must hold two class folders at least, got {self.class_names}.")
        parts = ("train", "val", "test") if (self.root / "val").exists() else ("train", "test")
        self.files = {part: self._list(part) for part in parts}

    def _list(self, part: str) -> Files:
        folders = class_folders(self.root / part)
        names = {folder.name for folder in folders}
        if names != set(self.class_names):
            raise DataError(
                f"{self.root / part} and {self.root / 'train'} must have the same class folders; "
                f"missing: {sorted(set(self.class_names) - names)}, too many: {sorted(names - set(self.class_names))}."
            )
        return list_files(folders)

    def load_train_val(self) -> tuple[Images, Images]:
        """Reads all parts, the test images too, so that one error before any work names all bad files."""
        train = self.files["train"]
        if "val" in self.files:
            parts = [train, self.files["val"]]
        else:
            parts = [
                Files([train.paths[i] for i in index], [train.targets[i] for i in index])
                for index in stratified_split(torch.tensor(train.targets), self.val_size, self.split_seed)
            ]
        self._check_train_size(parts[0].targets)
        train_data, val_data, self.test_data = map(self._checked, self.read(*parts, self.files["test"]))
        return train_data, val_data

    def load_test(self) -> Images:
        """Reads the test images."""
        (test_data,) = self.read(self.files["test"])
        return self._checked(test_data)


class PredictFolderDataModule(FileDataModule):
    """Images to predict with a network whose own data are not there.

    ``predict`` of the command line uses it instead of our other datamodules of files.

    Args:
        checkpoint: Checkpoint of the network, which holds the class names.
        predict_folder: Folder of images, in folders or not.
        image_size: Side of the square images, or height and width. An image is scaled to cover that and its middle cut
            out.
        **kwargs: As :class:`FileDataModule`. The Trainer refuses sizes, means and standard deviations that are not
            those of the checkpoint.

    Raises:
        InputError: If a setting is out of range, or the checkpoint does not hold class names.
    """

    def __init__(
        self, checkpoint: str, predict_folder: str | None, image_size: int | tuple[int, int], **kwargs: Any
    ) -> None:
        super().__init__(image_size, predict_folder=predict_folder, **kwargs)
        spec = saved_data_spec(read(checkpoint)) or DataSpec()
        spec.require("class_names")
        self.class_names = spec.class_names

    def load_train_val(self) -> tuple[Images, Images]:
        """Raise an error: there are no such images."""
        raise DataError("PredictFolderDataModule has images to predict only; use the datamodule of the training.")

    def load_test(self) -> Images:
        """Raise an error: there are no such images."""
        return self.load_train_val()[0]
