"""Callbacks that work with any module that offers an L-Softmax ``head``."""

from .annealing import LambdaAnnealing
from .dashboard import Dashboard
from .last import LastCheckpoint
from .monitor import MarginMonitor
from .predictions import Predictions
from .resume import ExactResume

__all__ = ["Dashboard", "ExactResume", "LambdaAnnealing", "LastCheckpoint", "MarginMonitor", "Predictions"]
