"""Scalars of the monitor against their definition, and their charts."""

import re

import pytest
import torch
import torch.nn.functional as F

from lsoftmax_lightning import LSoftmaxLinear
from lsoftmax_lightning.dashboard.scalars import layout, training_scalars, weight_scalars


def make_head() -> LSoftmaxLinear:
    torch.manual_seed(0)
    return LSoftmaxLinear(8, 5, margin=3, lambda_=2.0)


def test_training_scalars_equal_their_definition() -> None:
    head, features, target = make_head().requires_grad_(False), torch.randn(20, 8), torch.arange(20) % 5
    values = {tag: float(value) for tag, value in training_scalars(head, features, target).items()}
    theta = torch.cosine_similarity(features, head.weight[target]).arccos().rad2deg()
    segments = [float((theta // 60 == k).float().mean()) for k in range(3)]
    expected = {
        "train/cross_entropy": float(F.cross_entropy(head(features), target)),
        "train/angle": float(theta.mean()),
        "train/feature_norm": float(features.norm(dim=1).mean()),
        "train/segment_0": segments[0],
        "train/segment_1": segments[1],
        "train/segment_2": segments[2],
        "effective_margin": ((2 + 3**2) / (1 + 2)) ** 0.5,
    }
    assert values == pytest.approx(expected, rel=1e-4)


def test_weight_scalars_are_the_angles_between_class_weights() -> None:
    head = make_head()
    values = {name: float(value) for name, value in weight_scalars(head).items()}
    unit = F.normalize(head.weight.detach())
    angles = (unit @ unit.T).clamp(-1, 1).arccos().rad2deg()
    others = angles[~torch.eye(5, dtype=torch.bool)].view(5, 4)
    expected = {
        "weight_angle_mean": float(others.mean()),
        "weight_angle_nearest": float(others.amin(1).mean()),
        "weight_angle_min": float(others.min()),
    }
    assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("has_pairs", [False, True])
def test_every_scalar_has_a_chart(has_pairs: bool) -> None:
    head = make_head()
    charts = [chart for charts in layout(has_pairs, follows_accuracy=True).values() for chart in charts.values()]
    patterns = [pattern for _, patterns in charts for pattern in patterns]
    tags = [
        *training_scalars(head, torch.randn(4, 8), torch.arange(4)),
        *(f"val/{name}" for name in weight_scalars(head)),
    ]
    for tag in tags:
        assert "/segment_" in tag or any(re.match(pattern, tag) for pattern in patterns), tag  # segments have a plot
