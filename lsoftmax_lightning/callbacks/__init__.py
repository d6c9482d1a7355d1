"""Callbacks that work with any module that offers an L-Softmax ``head``."""

from .annealing import LambdaAnnealing
from .dashboard import Dashboard
from .monitor import MarginMonitor

__all__ = ["Dashboard", "LambdaAnnealing", "MarginMonitor"]
