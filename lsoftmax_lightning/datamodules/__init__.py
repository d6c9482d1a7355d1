"""LightningDataModules of the paper's benchmarks, and of your own images."""

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

for _module in iter_modules(__path__):  # the command line finds the classes of imported modules by name
    import_module(f"{__name__}.{_module.name}")
