"""Augmentation and normalisation of whole batches, on the device of the images."""

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
    """Interface of augmentations of whole training batches: a pure function of images and draws."""

    num_draws: int
    """Number of random draws per sample."""

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: uint8, ``(N, C, H, W)``.
            draws: Random numbers, uniform on [0, 1), float32, ``(N, num_draws)``.

        Returns:
            Images of the same shape and dtype.
        """


class RandomCropFlip:
    """Pad images with black, crop them back to their size at a random position, and mirror half of them.

    With ``padding=4, flip=True``, this is the augmentation of the paper's CIFAR10+ (section 5). The result is a pure
    function of images and draws, so the caller controls the seed.

    Args:
        padding: Pixels of black on each side. 0 disables the crop.
        flip: Whether to mirror each sample left to right with probability 1/2.

    Raises:
        InputError: If ``padding`` is negative.
    """

    num_draws = 3

    def __init__(self, padding: int = 0, flip: bool = False) -> None:
        if padding < 0:
            raise InputError(
                f"padding: must be at least 0 pixels, got {padding}; the paper uses 4 for images of 32 pixels."
            )
        self.padding = padding
        self.flip = flip

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and mirror a batch.

        Args:
            images: Images of any dtype, ``(N, C, H, W)``.
            draws: Random numbers for row, column and mirroring, uniform on [0, 1), float32, ``(N, 3)``.

        Returns:
            Images of the same shape and dtype.
        """
        height, width = images.shape[2:]
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().unbind(dim=1)
        mirrored = (draws[:, 2] < (0.5 if self.flip else 0)).long()
        corner = top * (width + 2 * self.padding) + left
        # one gather over the flattened pixels crops and mirrors
        pixels = _pixel_offsets(height, width, self.padding, images.device)[mirrored] + corner[:, None]
        padded = F.pad(images, (self.padding,) * 4).flatten(2)
        return padded.gather(2, pixels[:, None].expand(-1, images.shape[1], -1)).view_as(images)


@lru_cache
def _pixel_offsets(height: int, width: int, padding: int, device: torch.device) -> Tensor:
    """Return the offsets of the pixels of a crop from its corner in the flattened padded image.

    Returns:
        int64, ``(2, H * W)``: the offsets of the plain and of the mirrored crop.
    """
    plain = torch.arange(height)[:, None] * (width + 2 * padding) + torch.arange(width)
    return torch.stack([plain, plain.flip(1)]).flatten(1).to(device)


class Normalize:
    """Normalise uint8 images as torchvision's ``ToDtype`` and ``Normalize`` do, in one operation.

    torchvision copies mean and standard deviation to the device for each batch, which synchronises the device. This
    class copies them once.

    Args:
        mean: Mean of each channel, in 0 .. 1.
        std: Standard deviation of each channel, in 0 .. 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch.

        Args:
            images: uint8, ``(N, C, H, W)``. Other integers are scaled to 0 .. 1 by ``ToDtype``; floats must be in
                0 .. 1.

        Returns:
            Images, float32, of the same shape.
        """
        if images.device not in self._constants:
            constants = (-self._mean / self._std, 1 / (255 * self._std))
            shift, scale = (constant.to(images.device, torch.float32) for constant in constants)
            self._constants[images.device] = shift, scale
        shift, scale = self._constants[images.device]
        if images.dtype != torch.uint8:
            images = v2.functional.to_dtype(images, torch.float32, scale=True) * 255
        return torch.addcmul(shift, images, scale)
