"""Base class of the datasets that torchvision downloads and reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from ..errors import DataError
from .base import ImageDataModule, Images


class DownloadedDataModule(ImageDataModule):
    """Datamodule of a torchvision dataset that is kept in memory; a subclass defines the attributes.

    Args:
        root: Folder of the files. Missing files are downloaded there. torchvision verifies their checksums if it has
            them.
        **kwargs: Arguments of :class:`ImageDataModule`: ``batch_size``, ``val_size``, ``split_seed``, ``crop_padding``,
            ``flip``, ``train_size``, ``label_noise``, ``train_seed``.

    Attributes:
        reader: Dataset class of torchvision.
        files: Description of its files, for error messages.
        folder: Folder of these files, relative to ``root``.
    """

    reader: ClassVar[Any]
    files: ClassVar[str]
    folder: ClassVar[str]

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def prepare_data(self) -> None:
        """Download missing files, unless the images of ``predict_folder`` are predicted.

        Raises:
            DataError: If the download fails.
        """
        if self.predict_folder is not None and self.trainer and self.trainer.predicting:
            return
        self._read(train=False, download=True)  # downloads both splits and reads the smaller one

    @override
    def load(self, train: bool) -> Images:
        data = self._read(train, download=False)
        images = torch.as_tensor(data.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return Images(images, torch.as_tensor(data.targets))

    def _read(self, train: bool, download: bool) -> Any:
        try:
            return self.reader(self.root, train=train, download=download)
        except Exception as error:  # decoders may raise any error on damaged files
            raise DataError(
                f"cannot read {self.reader.__name__} in {Path(self.root).absolute()}: {error}\n"
                f"It needs {self.files} in {Path(self.root, self.folder)}, which are downloaded if there is network "
                f"access. Otherwise copy them from another machine and set --data.root (in Python: root=...) to the "
                f"folder above {self.folder}."
            ) from error
