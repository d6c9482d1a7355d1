"""Callbacks that work with any module that offers an L-Softmax ``head``."""

from .annealing import LambdaAnnealing

__all__ = ["LambdaAnnealing"]
