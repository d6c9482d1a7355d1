"""Callbacks for any module with an L-Softmax ``head``."""

from ..dashboard import Dashboard, MarginMonitor
from .annealing import LambdaAnnealing
from .best_checkpoint import BestCheckpoint
from .exit_on_signals import ExitOnSignals
from .last_checkpoint import LastCheckpoint
from .predictions import Predictions
from .progress import RunProgress
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
    "RunProgress",
]
