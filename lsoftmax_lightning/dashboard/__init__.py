"""Scalars and plots of a training with a margin, and the record of a test."""

from .dashboard import Dashboard
from .monitor import MarginMonitor

__all__ = ["Dashboard", "MarginMonitor"]
