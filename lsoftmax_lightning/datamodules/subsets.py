"""Subsets of the training images, and label noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


def check_size(name: str, size: int | float) -> int | float:
    """Return a size as a float if it is a fraction, and as an integer if it is a number of images.

    Args:
        name: Name of the setting, for the error message.
        size: Number of images, or a fraction. The float 1.0 is the fraction, all images; the integer 1 is one image.

    Raises:
        InputError: If ``size`` is neither.
    """
    if 0 < size < 1 or (isinstance(size, float) and size == 1):
        return size
    if size >= 1 and float(size).is_integer():
        return int(size)
    raise InputError(
        f"{name}: must be a number of images or a fraction between 0 and 1, got {size}; use 0.1 for a tenth of the "
        "images or 1000 for a thousand."
    )


def check_val_size(size: int | float) -> int | float:
    """Return ``val_size`` as :func:`check_size` does.

    Raises:
        InputError: If it is neither a number of images nor a fraction below 1.
    """
    if isinstance(size, float) and size == 1:
        raise InputError(
            "val_size: must leave training images, got 1.0, which leaves none; use 0.1 for a tenth of the images."
        )
    return check_size("val_size", size)


def subset_length(targets: Tensor, train_size: int | float) -> int:
    """Return the number of images that ``train_size`` keeps.

    Args:
        targets: Class of each training image, ``(N,)``.
        train_size: Number of images, int, or a fraction, float.

    Raises:
        InputError: If there are fewer images than that, or more classes.
    """
    length = round(train_size * len(targets)) if isinstance(train_size, float) else train_size
    num_classes = int(targets.bincount().count_nonzero())
    if length > len(targets):
        raise InputError(
            f"train_size: must be at most the {len(targets)} training images (without validation images), got "
            f"{train_size}; lower it, or set null for all images."
        )
    if length < num_classes:
        raise InputError(
            f"train_size: must keep an image of each of the {num_classes} classes, got {train_size} "
            f"({length} images); use at least {num_classes} images."
        )
    return length


def stratified_subset(targets: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Draw a subset in which the classes keep their proportions.

    Every class keeps at least one image. Subsets drawn with the same seed are nested: each contains all smaller ones.

    Args:
        targets: Class of each image, ``(N,)``.
        length: Number of images to keep, at least the number of classes.
        generator: Source of randomness.

    Returns:
        Indices of the images to keep, ``(length,)``, in ascending order.
    """
    order = torch.randperm(len(targets), generator=generator)
    by_class = targets[order].argsort(stable=True)
    counts = targets.bincount()
    # each image's random position within its class, from 0
    position = torch.empty_like(order)
    position[by_class] = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    key = (position + 0.5) / counts[targets[order]].double()
    key[position == 0] = 0  # the first image of every class is kept
    return order[key.argsort(stable=True)[:length]].sort().values


def random_labels(targets: Tensor, count: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Replace some labels by labels drawn uniformly over all classes.

    A drawn label may equal the label that it replaces.

    Args:
        targets: Class of each image, ``(N,)``.
        count: Number of labels to replace.
        num_classes: Number of classes.
        generator: Source of randomness.

    Returns:
        The new labels, ``(N,)``; ``targets`` does not change.
    """
    replaced = torch.randperm(len(targets), generator=generator)[:count]
    noisy = targets.clone()
    noisy[replaced] = torch.randint(num_classes, (count,), generator=generator, dtype=targets.dtype)
    return noisy
