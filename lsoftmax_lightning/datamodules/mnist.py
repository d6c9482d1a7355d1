"""MNIST."""

from __future__ import annotations

from torchvision.datasets import MNIST

from .downloaded import DownloadedDataModule


class MNISTDataModule(DownloadedDataModule):
    """60,000 + 10,000 handwritten digits of 28x28 pixels, read and downloaded by torchvision.

    Arguments are those of :class:`DownloadedDataModule`.
    """

    reader = MNIST
    files = "the four *-ubyte files of MNIST"
    folder = "MNIST/raw"
    class_names = tuple("0123456789")
    image_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)
