"""Callbacks that work with any module that offers an L-Softmax ``head``."""

from .annealing import LambdaAnnealing
from .dashboard import Dashboard
from .monitor import MarginMonitor
from .resume import EpochCount

__all__ = ["Dashboard", "EpochCount", "LambdaAnnealing", "MarginMonitor"]
