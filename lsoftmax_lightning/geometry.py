"""Angles between features and class weights, segments of psi, and the effective margin: for measurement."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_margin(margin: int, lambda_: float) -> float:
    """The constant margin m', in general not an integer, to which the annealed loss is equal near theta = 0.

    To second order in theta, (lambda cos(theta) + psi(theta)) / (1 + lambda) equals cos(m' theta) for
    m'^2 = (lambda + m^2) / (1 + lambda), which is m at lambda = 0 and tends to 1 as lambda grows.

    Args:
        margin: m, an integer >= 1.
        lambda_: Weight of the plain logit, 0 to infinity.
    """
    return math.sqrt(1 + (margin**2 - 1) / (1 + lambda_))


def degrees(cosine: Tensor) -> Tensor:
    """Angles in degrees, 0 to 180, of cosines, clamped to [-1, 1]. For measurement: the gradient is infinite at 1."""
    return cosine.clamp(-1, 1).arccos().rad2deg()


def target_angles(features: Tensor, weights: Tensor) -> Tensor:
    """Angle theta_y of each sample to the weight of its class, in degrees.

    Args:
        features: x, (N, D).
        weights: w_y, the weight of each sample's class, (N, D).

    Returns:
        Angles, float32 (N,).
    """
    return degrees(F.cosine_similarity(features.float(), weights.float()))


def evenly_spaced(num_classes: int, limit: int = 10_000) -> Tensor:
    """Indices of all classes, or of ``limit`` evenly spaced ones; 10,000 suffice to measure their separation."""
    return torch.linspace(0, num_classes - 1, min(num_classes, limit), dtype=torch.float64).round().long()


class Separation(NamedTuple):
    """Angles between directions in degrees, 0-d tensors; NaN for fewer than two directions."""

    mean: Tensor
    """Mean over all pairs."""
    nearest: Tensor
    """Mean over directions of the angle to the nearest other one."""
    min: Tensor
    """Smallest angle of all pairs."""


def separation(directions: Tensor) -> Separation:
    """Return the angles between directions, such as class weights.

    Args:
        directions: (C, D), of any norm but 0. If C is above 10,000, only :func:`evenly_spaced` ones are used.
    """
    unit = F.normalize(directions[evenly_spaced(len(directions)).to(directions.device)].float())
    count = len(unit)
    if count < 2:
        return Separation(*unit.new_full((3,), math.nan))
    total, nearest = unit.new_zeros(()), []
    for start in range(0, count, 1024):  # so that the C x C angles are never held at once
        angles = degrees(unit[start : start + 1024] @ unit.T)
        to_itself = angles.diagonal(start)
        to_itself.zero_()
        total += angles.sum()
        to_itself.fill_(180.0)
        nearest.append(angles.amin(dim=1))
    smallest = torch.cat(nearest)
    return Separation(total / (count * (count - 1)), smallest.mean(), smallest.min())


def segment_counts(angles: Tensor, margin: int) -> Tensor:
    """Return the number of angles in each segment k of psi (section 3.2), float32 (m,); NaN is in none.

    Args:
        angles: In degrees, (N,).
        margin: m, an integer >= 1.
    """
    segment = (angles * (margin / 180)).floor().clamp(max=margin - 1)
    return (segment.unsqueeze(1) == torch.arange(margin, device=angles.device)).float().sum(dim=0)
