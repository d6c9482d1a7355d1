"""Angles, separation and effective margin compared with their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from lsoftmax_lightning.functional import psi
from lsoftmax_lightning.geometry import degrees, effective_margin, evenly_spaced, separation, target_angles


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 5.0, 1000.0])
@pytest.mark.parametrize("m", range(1, 7))
def test_effective_margin_equals_that_of_the_annealed_loss_at_small_angles(m: int, lambda_: float) -> None:
    theta = torch.tensor(1e-3, dtype=torch.float64)
    annealed = (lambda_ * torch.cos(theta) + psi(torch.cos(theta), m)) / (1 + lambda_)
    assert effective_margin(m, lambda_) == pytest.approx(float(torch.arccos(annealed) / theta), rel=1e-5)
    assert effective_margin(m, 0.0) == m
    assert effective_margin(m, math.inf) == 1


def test_angles_of_samples_to_their_class() -> None:
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    features = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.0, -7.0]], dtype=torch.bfloat16)
    angles = target_angles(features, weight[[0, 1, 0, 1]])
    torch.testing.assert_close(angles, torch.tensor([0.0, 45.0, 180.0, 180.0]))
    assert degrees(torch.tensor([1 + 1e-6, -1 - 1e-6])).tolist() == [0, 180]


@pytest.mark.parametrize("count", [2, 7, 1024, 1500])  # within one block of rows, at its edge and beyond
def test_separation_equals_that_of_all_pairs(count: int) -> None:
    directions = (
        torch.randn(count, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, count)[:, None]
    )
    unit = F.normalize(directions.double())
    angles = torch.rad2deg(torch.arccos((unit @ unit.T).clamp(-1, 1)))
    others = angles[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    found = separation(directions)
    expected = (others.mean(), others.min(1).values.mean(), others.min())
    assert [float(angle) for angle in found] == pytest.approx([float(angle) for angle in expected], rel=1e-3)


def test_separation_of_one_direction_is_nan() -> None:
    assert all(math.isnan(angle) for angle in separation(torch.ones(1, 3)))


def test_separation_of_very_many_directions_uses_a_subset() -> None:
    directions = torch.eye(2)[torch.ones(12_000, dtype=torch.long)]
    directions[evenly_spaced(12_000)] = torch.eye(2)[0]
    assert separation(directions).mean == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("num_classes", [1, 2, 99, 100, 101, 20_000_000])
def test_evenly_spaced_classes_are_distinct_and_include_both_ends(num_classes: int) -> None:
    indices = evenly_spaced(num_classes, 100)
    assert len(indices) == min(num_classes, 100)
    assert (indices[0], indices[-1]) == (0, num_classes - 1)
    assert len(indices) == 1 or indices.diff().min() >= 1
