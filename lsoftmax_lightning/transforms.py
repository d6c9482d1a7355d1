"""Augmentation and normalisation of whole batches, on whatever device they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

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
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().unbind(dim=1)
        mirrored = (draws[:, 2] < 0.5 * self.flip).long()
        corner = top * (width + 2 * self.padding) + left
        # one gather over the flattened pixels does both
        pixels = _pixels(height, width, self.padding, images.device)[mirrored] + corner[:, None]
        padded = F.pad(images, (self.padding,) * 4).flatten(2)
        return padded.gather(2, pixels[:, None].expand(-1, images.shape[1], -1)).view_as(images)


@lru_cache
def _pixels(height: int, width: int, padding: int, device: torch.device) -> Tensor:
    """Positions of an image's pixels in the flattened padded one, from the corner of the crop; plain and mirrored."""
    plain = torch.arange(height)[:, None] * (width + 2 * padding) + torch.arange(width)
    return torch.stack([plain, plain.flip(1)]).flatten(1).to(device)


class Normalize:
    """Normalises the channels of uint8 images as torchvision's ``ToDtype`` and ``Normalize`` do, in one operation.

    Those copy mean and standard deviation to the device for each batch, which makes it wait.

    Args:
        mean: Mean of each channel, in 0 .. 1.
        std: Standard deviation of each channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return normalised images.

        Args:
            images: [N, C, H, W], uint8; of another type, as ``ToDtype`` scales it.

        Returns:
            Images, float32.
        """
        if images.device not in self._constants:
            constants = (-self._mean / self._std, 1 / (255 * self._std))
            shift, scale = (constant.to(images.device, torch.float32) for constant in constants)
            self._constants[images.device] = shift, scale
        shift, scale = self._constants[images.device]
        if images.dtype != torch.uint8:
            images = v2.functional.to_dtype(images, torch.float32, scale=True) * 255
        return torch.addcmul(shift, images, scale)
