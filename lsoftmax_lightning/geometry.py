"""Angles between features and class weights, segments of psi, and the effective margin, without gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_margin(margin: int, lambda_: float) -> float:
    """Compute the constant margin m' that is equivalent to the annealed margin near theta = 0.

    To second order in theta, (lambda cos(theta) + psi(theta)) / (1 + lambda) equals cos(m' theta) with
    m'^2 = (lambda + m^2) / (1 + lambda). m' is m at lambda = 0, and tends to 1 as lambda grows. It is in general not
    an integer.

    Args:
        margin: m, an integer >= 1.
        lambda_: Weight of the plain logit, 0 to infinity.

    Example:
        >>> from lsoftmax_lightning.geometry import effective_margin
        >>> effective_margin(4, lambda_=0.0), effective_margin(4, lambda_=4.0)
        (4.0, 2.0)
    """
    return math.sqrt(1 + (margin**2 - 1) / (1 + lambda_))


def degrees(cosine: Tensor) -> Tensor:
    """Convert cosines, clamped to [-1, 1], to angles of 0 to 180 degrees; the gradient is infinite at 1."""
    return cosine.clamp(-1, 1).arccos().rad2deg()


def target_angles(features: Tensor, weights: Tensor) -> Tensor:
    """Compute the angle theta_y between each sample and the weight of its class, in degrees.

    Args:
        features: x, (N, D).
        weights: w_y, the weight of each sample's class, (N, D).

    Returns:
        Angles, float32 (N,).
    """
    return degrees(F.cosine_similarity(features.float(), weights.float()))


def evenly_spaced(num_classes: int, limit: int = 10_000) -> Tensor:
    """Return the indices of all classes, or of ``limit`` evenly spaced ones if there are more; int64."""
    return torch.linspace(0, num_classes - 1, min(num_classes, limit), dtype=torch.float64).round().long()


class Separation(NamedTuple):
    """Angles between directions in degrees, as 0-d tensors; NaN for fewer than two directions."""

    mean: Tensor
    """Mean over all pairs."""
    nearest: Tensor
    """Mean over directions of the angle to the nearest other direction."""
    min: Tensor
    """Smallest angle of all pairs."""


def separation(directions: Tensor) -> Separation:
    """Compute the angles between directions, such as class weights.

    Args:
        directions: (C, D), with nonzero norms. If C is above 10,000, 10,000 :func:`evenly_spaced` directions are used.
    """
    unit = F.normalize(directions[evenly_spaced(len(directions)).to(directions.device)].float())
    count = len(unit)
    if count < 2:
        return Separation(*unit.new_full((3,), math.nan))
    total, nearest = unit.new_zeros(()), []
    for start in range(0, count, 1024):  # in blocks, to keep the (C, C) angles out of memory
        angles = degrees(unit[start : start + 1024] @ unit.T)
        to_itself = angles.diagonal(start)
        to_itself.zero_()
        total += angles.sum()
        to_itself.fill_(180.0)
        nearest.append(angles.amin(dim=1))
    smallest = torch.cat(nearest)
    return Separation(total / (count * (count - 1)), smallest.mean(), smallest.min())


def segment_counts(angles: Tensor, margin: int) -> Tensor:
    """Count the angles in each segment k of psi (section 3.2); NaN is in no segment.

    Args:
        angles: Angles in degrees, (N,).
        margin: m, an integer >= 1.

    Returns:
        Counts, float32 (m,).
    """
    segment = (angles * (margin / 180)).floor().clamp(max=margin - 1)
    return (segment.unsqueeze(1) == torch.arange(margin, device=angles.device)).float().sum(dim=0)
