"""The benchmarks of the paper as LightningDataModules, and your own images."""

from importlib import import_module
from pkgutil import iter_modules

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

for _module in iter_modules(__path__):  # gives the classes of every file their names on the command line
    import_module(f"{__name__}.{_module.name}")
