"""What a margin does, drawn from plain tensors: each function gives a matplotlib figure and touches nothing else.

Colours are Petroff's ten, chosen for colour-blind readers; beyond ten classes the marker changes too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib import color_sequences
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.classification import binary_roc

COLORS = color_sequences["petroff10"]
_MARKERS = "o^sDvP*X<>"
_LONGEST = 60  # characters in a line of text


def plane(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Points and rays for :func:`feature_scatter`.

    Features of two dimensions are what they are. Wider ones are projected so that each class keeps its place, in every
    epoch and for every margin: the classes are spread evenly over the unit circle, in their order, and each draws a
    sample towards its place by the cosine of the sample to its weight. Where class weights are at right angles, a
    sample on the direction of its weight is on the circle. Nothing is fitted, so pictures can be laid side by side.

    Args:
        features: x, [N, D].
        weight: W, [C, D].

    Returns:
        Points, [N, 2], and the same of the directions of the class weights, [C, 2].
    """
    directions = normalize(weight)
    if features.shape[1] == 2:
        return features, directions * torch.linalg.vector_norm(features, dim=1).quantile(0.99)
    turn = torch.arange(len(weight)) * (2 * math.pi / len(weight))
    places = torch.stack([turn.cos(), turn.sin()], dim=1)
    return normalize(features) @ directions.T @ places, directions @ directions.T @ places


def feature_scatter(
    points: Tensor,
    rays: Tensor,
    target: Tensor,
    class_names: Sequence[str],
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """The poster's figure: features as points, the directions of the class weights as rays.

    Args:
        points: [N, 2], see :func:`plane`.
        rays: [C, 2].
        target: Class of each sample, [N].
        class_names: C names; up to 100 can be told apart.
        title: Above the axes.
        axes: Where to draw, without a legend; by default a figure of its own.
    """
    columns = math.ceil(len(class_names) / 25)
    own_figure = axes is None
    axes = axes or Figure(figsize=(6.4 + 1.2 * columns, 6), layout="constrained").add_subplot()
    reach = torch.cat([1.05 * points, 1.15 * rays]).abs().nan_to_num().max()  # of points and of the names of rays
    limit = max(1.6, float(reach))  # where plane() projects seldom more, so that a film does not jump
    axes.set(title=title, aspect="equal", anchor="W", xlim=(-limit, limit), ylim=(-limit, limit))
    axes.grid(alpha=0.3)
    few = len(class_names) <= 25
    handles: list[Artist] = []
    for number, name in enumerate(class_names):
        color, marker = COLORS[number % 10], _MARKERS[(number + number // 10) % 10]
        x, y = rays[number].tolist()
        axes.plot([0, x], [0, y], color=color, linewidth=0.8, alpha=1 if few else 0.3)
        if few:
            axes.text(1.07 * x, 1.07 * y, _literal(name), ha="center", va="center", fontsize=8)
        own = points[target == number].numpy()
        handles += axes.plot(
            own[:, 0], own[:, 1], marker, color=color, markersize=3, markeredgewidth=0, label=_literal(name)
        )
    if own_figure:
        size = 9 if few else 7
        axes.legend(
            handles=handles,  # all of them: by default matplotlib leaves out names that begin with "_"
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            ncols=columns,
            fontsize=size,
            markerscale=2,
            frameon=False,
        )
    return _figure_of(axes)


def angle_histogram(
    angles: Mapping[str, Tensor], boundaries: Mapping[str, float], title: str = "", axes: Axes | None = None
) -> Figure:
    """Distributions of an angle, overlaid, against the boundaries that matter.

    Args:
        angles: By name, angles in degrees, [N] each; those without any are left out.
        boundaries: By name, an angle in degrees, drawn as a vertical line.
        title: Above the axes.
        axes: Where to draw; by default a figure of its own.
    """
    axes = axes or Figure(figsize=(7, 4.5), layout="constrained").add_subplot()
    axes.set(title=title, xlabel="degrees", ylabel="% of the samples, by degree")
    handles: list[Artist] = []
    for color, (name, values) in zip(cycle(COLORS), angles.items(), strict=False):
        if len(values):
            shares = torch.histc(values.float(), bins=180, min=0, max=180) * (100 / len(values))
            label = f"{name} (mean {values.float().mean():.1f}°)"
            axes.stairs(shares.numpy(), range(181), fill=True, color=color, alpha=0.35)
            handles.append(axes.stairs(shares.numpy(), range(181), color=color, label=_literal(label)))
    for style, (name, angle) in zip(("--", ":", "-."), boundaries.items(), strict=False):
        label = _literal(f"{name}: {angle:.1f}°")
        handles.append(axes.axvline(angle, color="black", linestyle=style, linewidth=1, label=label))
    # square roots: angles of a few degrees can be told apart, and none is cut off
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set(xlim=(0, 180), xticks=(0, 1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 150, 180))
    axes.legend(handles=handles, frameon=False)
    return _figure_of(axes)


def angle_map(angles: Tensor, class_names: Sequence[str], title: str = "") -> Figure:
    """Angles between classes, in degrees [C, C], as a heat map."""
    side = _side(class_names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    image = _matrix(figure.add_subplot(title=title), angles, class_names, cmap="viridis_r", vmin=0, vmax=120)
    figure.colorbar(image, label="degrees", extend="max")
    return figure


def confusion(
    values: Tensor,
    class_names: Sequence[str],
    unit: str = "images",
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """A confusion matrix.

    Args:
        values: By true (rows) and predicted class, [C, C]: counts, or see :func:`percent_of_rows`.
        class_names: C names.
        unit: Of the values.
        title: Above the axes.
        axes: Where to draw; by default a figure of its own.
    """
    side = _side(class_names)
    axes = axes or Figure(figsize=(side + 1, side), layout="constrained").add_subplot()
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    image = _matrix(axes, values, class_names, cmap="Blues", vmin=0, vmax=float(values.max()))
    figure = _figure_of(axes)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def percent_of_rows(counts: Tensor, totals: Tensor | None = None) -> Tensor:
    """Shares of each row of counts [C, C] in percent; 0 in a row without any.

    Args:
        counts: Images by true (rows) and predicted class, [C, C].
        totals: Images of each true class, [C], where some were predicted as classes that have no column.
    """
    totals = counts.sum(dim=1) if totals is None else totals
    return 100 * counts / totals.clamp_min(1).unsqueeze(1)


def image_strip(images: Tensor, captions: Sequence[str], title: str = "", columns: int = 6) -> Figure:
    """Images in a grid, each with a caption below it.

    Args:
        images: uint8 [K, channels, height, width], in grey or in colour.
        captions: K of them, of up to three lines.
        title: Above the grid.
        columns: Images in a row.
    """
    rows = math.ceil(len(images) / columns)
    height = 1.8 * images.shape[2] / images.shape[3] + 0.5  # inches of an image and its caption
    figure = Figure(figsize=(1.8 * columns, height * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(_literal(caption), fontsize=8, y=0, va="top", pad=-3)
    return figure


def roc(pairs: Mapping[str, tuple[Tensor, Tensor]], title: str = "") -> Figure:
    """How many same pairs are accepted at how many false accepts, on a logarithmic axis.

    Args:
        pairs: By name, the cosines of the embeddings of each pair, [P], and whether it shows the same identity, [P].
        title: Above the axes.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(
        title=title, xlabel="different pairs accepted", ylabel="same pairs accepted", xscale="log"
    )
    handles: list[Artist] = []
    least = min(0.5 / max(1, int((same == 0).sum())) for _, same in pairs.values())  # where "none" is drawn
    for color, (name, (cosines, same)) in zip(cycle(COLORS), pairs.items(), strict=False):
        false, true, _ = binary_roc((cosines + 1) / 2, same.long())
        x, y = false.clamp_min(least).numpy(), true.numpy()
        handles += axes.plot(x, y, color=color, drawstyle="steps-post", label=_literal(name))
    chance = torch.logspace(math.log10(least), 0, 100).numpy()
    handles += axes.plot(chance, chance, color="black", linestyle=":", linewidth=1, label="chance")
    axes.set(xlim=(least, 1), ylim=(0, 1.01))
    axes.grid(alpha=0.3)
    axes.legend(handles=handles, frameon=False, loc="lower right")
    return figure


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _literal(text: str) -> str:
    """A name as it is, cut if it is long; between two dollars matplotlib would read mathematics."""
    lines = (line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…" for line in text.split("\n"))
    return "\n".join(lines).replace("$", r"\$")


def _side(class_names: Sequence[str]) -> float:
    """Inches that a matrix takes so that names can be read."""
    return max(6.0, 0.13 * len(class_names))


def _matrix(axes: Axes, values: Tensor, class_names: Sequence[str], **colors: Any) -> AxesImage:
    """Draws a square matrix with names beside it and, where there is room, what is not 0 written in it."""
    image = axes.imshow(values.numpy(), **colors)
    class_names = [_literal(name) for name in class_names]
    count = len(class_names)
    size = 9 if count <= 25 else 7
    axes.set_xticks(range(count), class_names, rotation=90 if max(map(len, class_names)) > 2 else 0, fontsize=size)
    axes.set_yticks(range(count), class_names, fontsize=size)
    if count <= 20:
        middle = sum(image.get_clim()) / 2
        for row, column in values.nonzero().tolist():
            value = float(values[row, column])
            color = "white" if value > middle else "black"  # colour maps here are dark where values are high
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, color=color)
    return image
