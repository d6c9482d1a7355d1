"""What the benchmarks that torchvision downloads and reads have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import DataError
from .base import ImageDataModule, Images


class DownloadedDataModule(ImageDataModule):
    """Images of a torchvision reader that keeps them whole in memory; a subclass states the attributes.

    Args:
        root: Folder of the files, which are downloaded into it where they are missing, and checked by checksum where
            torchvision has one for them.
        **kwargs: As :class:`ImageDataModule`: ``batch_size``, ``val_size``, ``split_seed``, ``crop_padding``, ``flip``,
            ``train_size``, ``label_noise``, ``train_seed``.

    Attributes:
        reader: The class of torchvision.
        files: What it reads, in words.
        folder: Where, under ``root``.
    """

    reader: ClassVar[Any]
    files: ClassVar[str]
    folder: ClassVar[str]

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def prepare_data(self) -> None:
        """Downloads what is missing, unless the images of ``predict_folder`` are predicted.

        Raises:
            DataError: If that fails.
        """
        if self.predict_folder is not None and self.trainer and self.trainer.predicting:
            return
        self._read(train=False, download=True)  # fetches both parts, and reads the smaller

    def load(self, train: bool) -> Images:
        """The training or the test images.

        Raises:
            DataError: If they are missing or damaged.
        """
        data = self._read(train, download=False)
        images = torch.as_tensor(data.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return Images(images, torch.as_tensor(data.targets))

    def _read(self, train: bool, download: bool) -> Any:
        try:
            return self.reader(self.root, train=train, download=download)
        except Exception as error:  # damaged files raise whatever their decoder meets
            raise DataError(
                f"cannot read {self.reader.__name__} in {Path(self.root).absolute()}: {error}\n"
                f"It needs {self.files} in {Path(self.root, self.folder)}, which are downloaded there when the network "
                f"allows. Where it does not, copy them from elsewhere and name the folder above {self.folder} with "
                "--data.root (in Python: root=...)."
            ) from error
