"""MNIST and Fashion-MNIST."""

from __future__ import annotations

from torchvision.datasets import MNIST, FashionMNIST

from .downloaded import DownloadedDataModule


class MNISTDataModule(DownloadedDataModule):
    """60,000 + 10,000 handwritten digits of 28x28 pixels, read and downloaded by torchvision.

    The arguments are those of :class:`DownloadedDataModule`.
    """

    reader = MNIST
    files = "the four *-ubyte files of MNIST"
    folder = "MNIST/raw"
    class_names = tuple("0123456789")
    image_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)


class FashionMNISTDataModule(DownloadedDataModule):
    """60,000 + 10,000 grey images of clothing of 28x28 pixels in ten classes, read and downloaded by torchvision.

    Source: Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017. The
    arguments are those of :class:`DownloadedDataModule`.
    """

    reader = FashionMNIST
    files = "the four *-ubyte files of Fashion-MNIST"
    folder = "FashionMNIST/raw"
    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    image_shape = (1, 28, 28)
    mean = (0.2860,)
    std = (0.3530,)
