"""What a training with a margin shows: scalars, plots, and the record of a test."""

from .dashboard import Dashboard
from .monitor import MarginMonitor

__all__ = ["Dashboard", "MarginMonitor"]
