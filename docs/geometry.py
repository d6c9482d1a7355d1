"""Draw the geometry of L-Softmax: the boundaries of two classes in the plane, and psi.

The regions are computed on a grid from the logits of the training code, ``functional.margin_logits``.

Usage: python docs/geometry.py OUTPUT.png
"""

from __future__ import annotations

import math
import sys

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lsoftmax_lightning.dashboard.plots import COLORS
from lsoftmax_lightning.functional import margin_logits, plain_logits, psi

BETWEEN = 90.0  # degrees between the two class weights
MIDDLE = 90.0  # direction of the softmax boundary, in degrees
BLUE, ORANGE, GREEN = COLORS[0], COLORS[1], COLORS[2]


def direction(degrees: Tensor | float) -> Tensor:
    """Return unit vectors, ``(..., 2)``, of directions in degrees."""
    radians = torch.as_tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


def class_weights() -> Tensor:
    """Return W, ``(2, 2)``: two weights of norm 1, to the right and to the left of the middle."""
    return direction(torch.tensor([MIDDLE - BETWEEN / 2, MIDDLE + BETWEEN / 2]))


def accepted(features: Tensor, label: int, margin: int) -> Tensor:
    """Return whether the target logit with the margin is the highest for features of a class, bool ``(N,)``."""
    weight = class_weights()
    target = torch.full((len(features),), label)
    logits = margin_logits(plain_logits(features, weight), features, weight, target, margin)
    return logits.argmax(dim=1) == label


def boundary(margin: int) -> float:
    """Return the largest angle to its weight, in degrees, at which class 0 is accepted, from the grid."""
    angles = torch.linspace(0, BETWEEN, 9001, dtype=torch.float64)
    inside = accepted(direction(MIDDLE - BETWEEN / 2 + angles), 0, margin)
    return float(angles[inside].max())


def draw_plane(axes: Axes, margin: int) -> None:
    """Draw the weights, the regions that the margin accepts, and the boundaries."""
    side = torch.linspace(-1.1, 1.1, 881, dtype=torch.float64)
    height = torch.linspace(0, 1.2, 481, dtype=torch.float64)
    y, x = torch.meshgrid(height, side, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], dim=1)
    is_inside = (points.norm(dim=1) <= 1).view(x.shape)
    for label, color in ((0, BLUE), (1, ORANGE)):
        region = accepted(points, label, margin).view(x.shape) & is_inside
        axes.contourf(x, y, region.double(), levels=[0.5, 1.5], colors=[color], alpha=0.25)
    for label, (weight, color) in enumerate(zip(class_weights().tolist(), (BLUE, ORANGE), strict=True)):
        axes.annotate("", weight, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2})
        axes.text(1.1 * weight[0], 1.08 * weight[1], f"$w_{label + 1}$", color=color, ha="center", va="center")
    axes.plot([0, 0], [0, 1], "--", color="black", linewidth=1.2)
    axes.text(0, 1.04, "softmax", ha="center", va="bottom", fontsize=9)
    angle = boundary(margin)
    if margin > 1:
        for start, sign, color in ((MIDDLE - BETWEEN / 2, 1, BLUE), (MIDDLE + BETWEEN / 2, -1, ORANGE)):
            end = direction(start + sign * angle)
            axes.plot([0, float(end[0])], [0, float(end[1])], color=color, linewidth=1.2)
        axes.text(0, 0.75, "margin", ha="center", va="center", fontsize=9, backgroundcolor="white")
    arc = direction(torch.linspace(MIDDLE - BETWEEN / 2, MIDDLE - BETWEEN / 2 + angle, 50, dtype=torch.float64)) * 0.4
    axes.plot(*arc.T, color=BLUE, linewidth=1.2)
    label_at = direction(MIDDLE - BETWEEN / 2 + angle / 2) * (0.5 if angle > 25 else 0.72)  # where the region is wide
    axes.text(float(label_at[0]), float(label_at[1]), f"{angle:.0f}°", ha="center", va="center", fontsize=9, color=BLUE)
    axes.set(title=f"m = {margin}", aspect="equal", xlim=(-1, 1), ylim=(-0.02, 1.17))
    axes.set_axis_off()


def draw_psi(axes: Axes) -> None:
    """Draw psi, the logit of the other class, and where they cross."""
    theta = torch.linspace(0, 180, 721, dtype=torch.float64)
    for margin, color in zip((1, 2, 4), ("black", GREEN, COLORS[3]), strict=True):
        angle = boundary(margin)
        axes.plot(theta, psi(theta.deg2rad().cos(), margin), color=color, label=f"class 1: ψ, m = {margin}")
        axes.plot(angle, math.cos(math.radians(BETWEEN - angle)), "o", color=color, markersize=5)
    other = theta[theta <= BETWEEN]
    axes.plot(other, (BETWEEN - other).deg2rad().cos(), "--", color=ORANGE, label="class 2: cosine")
    axes.set(xlabel="angle to $w_1$, degrees", ylabel="logit, all norms 1", xticks=range(0, 181, 45), xlim=(0, 180))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def main(output: str) -> None:
    """Draw three planes and psi."""
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.3)).flat
    for margin, axes in zip((1, 2, 4), top.subplots(1, 3), strict=True):
        draw_plane(axes, margin)
    draw_psi(bottom.subplots())
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
