"""The benchmarks of the paper as LightningDataModules."""

from .base import ImageDataModule
from .digits import DigitsDataModule
from .mnist import MNISTDataModule

__all__ = ["DigitsDataModule", "ImageDataModule", "MNISTDataModule"]
