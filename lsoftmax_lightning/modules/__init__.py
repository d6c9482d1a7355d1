"""LightningModules with an L-Softmax head."""

from .base import LSoftmaxModule
from .classification import ClassificationModule

__all__ = ["ClassificationModule", "LSoftmaxModule"]
