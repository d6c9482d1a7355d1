"""Augmentation of whole batches, on whatever device they are, with a draw of its own for each sample."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError


class Augmentation(Protocol):
    """What training may do to a whole batch; it is a function of images and draws alone."""

    num_draws: int
    """How many draws a sample takes."""

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augmented images like ``images`` [N, C, H, W], uint8, for draws uniform on [0, 1), [N, num_draws]."""


class RandomCropFlip:
    """Pads images with black, crops them back at a random place, and mirrors half of them.

    With ``padding=4, flip=True`` this is the "+" of the paper's CIFAR10+ (section 5). It is a pure function of images
    and draws: who gives the draws decides on seed, order and processes.

    Args:
        padding: Pixels of black on each side; 0 leaves the place of the image alone.
        flip: Whether to mirror left and right, each sample with probability 1/2.

    Raises:
        InputError: If ``padding`` is negative.
    """

    num_draws = 3

    def __init__(self, padding: int = 0, flip: bool = False) -> None:
        if padding < 0:
            raise InputError(f"padding must be 0 pixels or more, got {padding}.")
        self.padding = padding
        self.flip = flip

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crops and mirrors.

        Args:
            images: [N, C, H, W], any type.
            draws: Uniform on [0, 1), float32 [N, 3]: for row, column and mirroring.

        Returns:
            Images like ``images``.
        """
        height, width = images.shape[2:]
        top, left = (draws[:, :2].T * (2 * self.padding + 1)).long()
        row = torch.arange(height, device=images.device)
        column = torch.arange(width, device=images.device)
        mirrored = draws[:, 2:] < 0.5 * self.flip
        rows = top[:, None] + row
        columns = left[:, None] + torch.where(mirrored, width - 1 - column, column)
        # one gather over the flattened pixels does both
        pixels = rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]
        padded = F.pad(images, (self.padding,) * 4).flatten(2)
        index = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        return padded.gather(2, index).view_as(images)
