"""The benchmarks of the paper as LightningDataModules, and your own images."""

from .base import ImageDataModule
from .cifar import CIFAR10DataModule, CIFAR100DataModule
from .digits import DigitsDataModule
from .folder import ImageFolderDataModule, PredictFolderDataModule
from .lfw import LFWDataModule, LFWFoldDataModule
from .mnist import FashionMNISTDataModule, MNISTDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "LFWDataModule",
    "LFWFoldDataModule",
    "MNISTDataModule",
    "PredictFolderDataModule",
]
