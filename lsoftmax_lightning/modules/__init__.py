"""LightningModules with an L-Softmax head."""

from .base import LSoftmaxModule
from .classification import ClassificationModule
from .verification import VerificationModule

__all__ = ["ClassificationModule", "LSoftmaxModule", "VerificationModule"]
