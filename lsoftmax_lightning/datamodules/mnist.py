"""MNIST."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import MNIST

from ..errors import DataError
from .base import ImageDataModule, Images


class MNISTDataModule(ImageDataModule):
    """60,000 + 10,000 handwritten digits of 28x28 pixels, read and downloaded by torchvision.

    Args:
        root: Folder that holds ``MNIST/raw``; the files are downloaded into it where they are missing.
        batch_size: Global batch size in training.
        val_size: Training images held out for validation: a number, or a share below 1.
        split_seed: Seed of the validation split.
    """

    class_names = tuple("0123456789")
    image_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)

    def __init__(self, root: str = "data", batch_size: int = 256, val_size: float = 0.1, split_seed: int = 0) -> None:
        super().__init__(batch_size, val_size, split_seed)
        self.root = root

    def prepare_data(self) -> None:
        """Downloads what is missing.

        Raises:
            DataError: If that fails.
        """
        self._read(train=False, download=True)  # fetches both parts, and reads the smaller

    def load(self, train: bool) -> Images:
        """The training or the test images.

        Raises:
            DataError: If they are missing or damaged.
        """
        data = self._read(train, download=False)
        return Images(data.data.unsqueeze(1), data.targets)

    def _read(self, train: bool, download: bool) -> MNIST:
        try:
            return MNIST(self.root, train=train, download=download)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            raise DataError(
                f"cannot read MNIST in {Path(self.root).absolute()}: {error}\n"
                f"It needs the four *-ubyte files of MNIST in {Path(self.root, 'MNIST', 'raw')}, which are downloaded "
                "there when the network allows. Where it does not, copy them from elsewhere and name the folder above "
                "MNIST/raw with --data.root (in Python: root=...)."
            ) from error
