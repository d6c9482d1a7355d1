"""Callbacks that work with any module that offers an L-Softmax ``head``."""

from .annealing import LambdaAnnealing
from .best_checkpoint import BestCheckpoint
from .dashboard import Dashboard
from .exit_on_signals import ExitOnSignals
from .last_checkpoint import LastCheckpoint
from .monitor import MarginMonitor
from .predictions import Predictions
from .resume import ExactResume

__all__ = [
    "BestCheckpoint",
    "Dashboard",
    "ExactResume",
    "ExitOnSignals",
    "LambdaAnnealing",
    "LastCheckpoint",
    "MarginMonitor",
    "Predictions",
]
