"""Plots of the effect of a margin: functions from tensors to matplotlib figures, without side effects.

The ten colours are seaborn's colour-blind palette, with black instead of grey. With more than ten classes, markers
differ, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.classification import binary_roc

COLORS = (
    "#0173b2",
    "#de8f05",
    "#029e73",
    "#d55e00",
    "#cc78bc",
    "#ca9161",
    "#fbafe4",
    "#000000",
    "#ece133",
    "#56b4e9",
)
DPI = 200
"""Dots an inch of every plot, for loggers and files."""
STAGES = {"train": "training", "val": "validation", "test": "test"}
"""Name of each stage in words."""
_STAGE_COLORS = {"train": COLORS[0], "val": COLORS[1], "test": COLORS[2]}
_BIN_DEGREES = ((2000, 1), (500, 2), (0, 5))
"""Minimum number of samples, and width of the bins of their histogram."""
_MARKERS = "o^sDvP*X<>"
_MAX_LINE = 60  # characters


def plane(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return points and rays for :func:`feature_scatter`.

    Two-dimensional features are kept. Wider features are projected so that each class has the same place in every epoch
    and for every margin: the classes are spaced evenly on the unit circle, in order, and a sample is the sum of their
    places, weighted by the cube of its cosine to each class weight; negative cosines count as 0. The cube lets the
    nearest class dominate. If the class weights are orthogonal, a sample in the direction of a weight lies on the
    circle. Nothing is fitted, so plots of several runs can be compared.

    Args:
        features: x, ``(N, D)``.
        weight: W, ``(C, D)``.

    Returns:
        Points ``(N, 2)``, and rays ``(C, 2)``, the projected directions of the class weights.
    """
    directions = normalize(weight)
    if features.shape[1] == 2:
        norms = torch.linalg.vector_norm(features, dim=1)
        return features, directions * norms.where(norms.isfinite(), math.nan).nanquantile(0.99)
    angles = torch.arange(len(weight)) * (2 * math.pi / len(weight))
    places = torch.stack([angles.cos(), angles.sin()], dim=1)
    points, rays = ((normalize(x) @ directions.T).clamp_min(0).pow(3) @ places for x in (features, directions))
    return points, rays


def feature_scatter(
    points: Tensor,
    rays: Tensor,
    target: Tensor,
    class_names: Sequence[str],
    title: str = "",
    axes: Axes | None = None,
    projected: bool = False,
) -> Figure:
    """Plot features as points, and the directions of the class weights as rays.

    Args:
        points: ``(N, 2)``, see :func:`plane`.
        rays: ``(C, 2)``.
        target: Class of each sample, ``(N,)``.
        class_names: C names; up to 100 are drawn differently.
        title: Title of the axes.
        axes: Axes to draw on, without a legend. Default: a new figure.
        projected: Whether the points are projections of wider features.
    """
    columns = math.ceil(len(class_names) / 25)
    has_legend = axes is None
    axes = axes or Figure(figsize=(6.4 + 1.2 * columns, 6), layout="constrained").add_subplot()
    extent = torch.cat([1.05 * points, 1.15 * rays]).abs().nan_to_num().max()  # of points and ray labels
    limit = max(1.3, float(extent))  # plane() rarely projects beyond, so the axes of a sequence of plots stay the same
    axes.set(title=title, aspect="equal", anchor="W", xlim=(-limit, limit), ylim=(-limit, limit))
    if projected:
        axes.set(xlabel="x: classes on a circle, weighted by cosine³", ylabel="y")
    else:
        axes.set(xlabel="feature 1", ylabel="feature 2")
    axes.grid(alpha=0.3)
    few = len(class_names) <= 25
    handles: list[Artist] = []
    for index, name in enumerate(class_names):
        color, marker = COLORS[index % 10], _MARKERS[(index + index // 10) % 10]
        x, y = rays[index].tolist()
        axes.plot([0, x], [0, y], color=color, linewidth=0.8, alpha=1 if few else 0.3)
        if few:
            axes.text(1.07 * x, 1.07 * y, _literal(name), ha="center", va="center", fontsize=8)
        class_points = points[target == index].numpy()
        handles += axes.plot(
            class_points[:, 0],
            class_points[:, 1],
            marker,
            color=color,
            markersize=3,
            markeredgewidth=0,
            label=_literal(name),
        )
    if has_legend:
        size = 9 if few else 7
        axes.legend(
            handles=handles,  # by default matplotlib leaves out names that begin with "_"
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            ncols=columns,
            fontsize=size,
            markerscale=2,
            frameon=False,
        )
    return _root_figure(axes)


def angle_histogram(
    angles: Mapping[str, Tensor], boundaries: Mapping[str, float], title: str = "", axes: Axes | None = None
) -> Figure:
    """Plot histograms of angles in one diagram, with boundaries as vertical lines.

    Args:
        angles: Angles in degrees by name, ``(N,)`` each; empty ones are left out.
        boundaries: Angles of the vertical lines in degrees, by name.
        title: Title of the axes.
        axes: Axes to draw on. Default: a new figure.
    """
    axes = axes or Figure(figsize=(7, 4.5), layout="constrained").add_subplot()
    axes.set(title=title, xlabel="angle in degrees", ylabel="% of the samples, per degree")
    handles: list[Artist] = []
    colors = COLORS[len(STAGES) :] if STAGES.keys() & angles.keys() else COLORS
    for color, (name, values) in zip(cycle(colors), angles.items(), strict=False):
        if len(values):
            width = next(width for min_samples, width in _BIN_DEGREES if len(values) >= min_samples)
            counts = torch.histc(values.float(), bins=180 // width, min=0, max=180)
            percent, edges = (counts * (100 / len(values) / width)).numpy(), range(0, 181, width)
            label = _literal(f"{STAGES.get(name, name)} (mean {values.float().nanmean():.1f}°)")
            color = _STAGE_COLORS.get(name, color)
            axes.stairs(percent, edges, fill=True, color=color, alpha=0.3)
            handles.append(axes.stairs(percent, edges, color=color, linewidth=1.5, label=label))
    for style, (name, angle) in zip(("--", ":", "-."), boundaries.items(), strict=False):
        label = _literal(f"{name}: {angle:.1f}°")
        handles.append(axes.axvline(angle, color="black", linestyle=style, linewidth=1, label=label))
    # a square root scale separates small angles and still shows all of them
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set(xlim=(0, 180), xticks=(0, 1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 150, 180))
    axes.legend(handles=handles, frameon=False)
    return _root_figure(axes)


def segment_bars(fractions: Mapping[str, Tensor], title: str = "") -> Figure:
    """Plot the fractions of samples in the segments of psi as stacked bars (section 3.2 of the paper).

    Args:
        fractions: Fractions of the samples with an angle in ``[k pi / m, (k + 1) pi / m]``, ``(m,)``, by stage.
        title: Title of the axes.
    """
    figure = Figure(figsize=(7, 1.6 + 0.6 * len(fractions)), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="% of the samples", xlim=(0, 100))
    names = [STAGES.get(name, name) for name in fractions]
    percent = 100 * torch.stack([values.float() for values in fractions.values()], dim=1)
    colors = colormaps["viridis_r"](np.linspace(0.05, 0.95, len(percent)))
    left = np.zeros(len(names))
    for k, (values, color) in enumerate(zip(percent.numpy(), colors, strict=True)):
        low, high = (180 * edge / len(percent) for edge in (k, k + 1))
        axes.barh(names, values, left=left, color=color, label=f"{low:.0f}° to {high:.0f}°")
        left += values
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="angle")
    return figure


def angle_map(angles: Tensor, class_names: Sequence[str], title: str = "") -> Figure:
    """Plot the angles between classes, ``(C, C)`` in degrees, as a heat map with a blank diagonal."""
    side = _inches(class_names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    off_diagonal = angles.clone().fill_diagonal_(math.nan)
    # with more than two classes, few weights are more than 120 degrees apart
    image = _matrix(figure.add_subplot(title=title), off_diagonal, class_names, cmap="viridis_r", vmin=40, vmax=120)
    figure.colorbar(image, label="degrees", extend="both")
    return figure


def confusion(
    values: Tensor,
    class_names: Sequence[str],
    unit: str = "images",
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Plot a confusion matrix.

    Args:
        values: Counts by true class (rows) and predicted class, ``(C, C)``, or their :func:`percent_of_rows`.
        class_names: C names.
        unit: Unit of the values.
        title: Title of the axes.
        axes: Axes to draw on. Default: a new figure.
    """
    side = _inches(class_names)
    axes = axes or Figure(figsize=(side + 1, side), layout="constrained").add_subplot()
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    decimals = int(values.is_floating_point())
    image = _matrix(axes, values, class_names, decimals, cmap="Blues", vmin=0, vmax=float(values.max()))
    figure = _root_figure(axes)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def percent_of_rows(counts: Tensor, totals: Tensor | None = None) -> Tensor:
    """Return counts in percent of the total of their row; 0 for an empty row.

    Args:
        counts: Images by true class (rows) and predicted class, ``(C, C)``.
        totals: Images of each true class, ``(C,)``. Default: the sums of the rows.
    """
    totals = counts.sum(dim=1) if totals is None else totals
    return 100 * counts / totals.clamp_min(1).unsqueeze(1)


def image_strip(images: Tensor, captions: Sequence[str], title: str = "", columns: int = 6) -> Figure:
    """Plot images in a grid, each above its caption.

    Args:
        images: uint8, ``(K, channels, height, width)``, with one or three channels.
        captions: K captions of up to three lines.
        title: Title of the figure.
        columns: Images in a row.
    """
    columns = min(columns, max(1, len(images)))
    rows = math.ceil(len(images) / columns)
    height = 1.8 * min(4, images.shape[2] / images.shape[3]) + 0.5  # inches for an image and its caption
    figure = Figure(figsize=(max(5, 1.8 * columns), height * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(_literal(caption), fontsize=8, y=0, va="top", pad=-3)
    return figure


def roc(pairs: Mapping[str, tuple[Tensor, Tensor]], title: str = "") -> Figure:
    """Plot ROC curves of face verification, with the false accept rate on a logarithmic axis.

    Args:
        pairs: Cosines of the embeddings of each pair, ``(P,)``, and whether it shows the same identity, ``(P,)``, by
            name.
        title: Title of the axes.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(
        title=title, xlabel="different pairs accepted", ylabel="same pairs accepted", xscale="log"
    )
    handles: list[Artist] = []
    lowest = min(0.5 / max(1, int((same == 0).sum())) for _, same in pairs.values())  # stands for 0 on a log axis
    for color, (name, (cosines, same)) in zip(cycle(COLORS), pairs.items(), strict=False):
        false, true, _ = binary_roc((cosines + 1) / 2, same.long())
        x, y = false.clamp_min(lowest).numpy(), true.numpy()
        handles += axes.plot(x, y, color=color, drawstyle="steps-post", label=_literal(name))
    chance = torch.logspace(math.log10(lowest), 0, 100).numpy()
    handles += axes.plot(chance, chance, color="black", linestyle=":", linewidth=1, label="chance")
    axes.set(xlim=(lowest, 1), ylim=(0, 1.01))
    axes.grid(alpha=0.3)
    axes.legend(handles=handles, frameon=False, loc="lower right")
    return figure


def _root_figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _literal(text: str) -> str:
    """Escape dollar signs, which matplotlib reads as mathematics, and truncate long lines."""
    lines = (line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 1]}…" for line in text.split("\n"))
    return "\n".join(lines).replace("$", r"\$")


def _inches(class_names: Sequence[str]) -> float:
    """Return the side of a matrix in inches at which its labels are readable."""
    return max(6.0, 0.13 * len(class_names))


def _matrix(axes: Axes, values: Tensor, class_names: Sequence[str], decimals: int = 0, **colors: Any) -> AxesImage:
    """Draw a square matrix with class names as tick labels; with up to 20 classes, also write its nonzero values."""
    image = axes.imshow(values.numpy(), **colors)
    class_names = [_literal(name) for name in class_names]
    count = len(class_names)
    size = 9 if count <= 25 else 7
    axes.set_xticks(range(count), class_names, rotation=90 if max(map(len, class_names)) > 2 else 0, fontsize=size)
    axes.set_yticks(range(count), class_names, fontsize=size)
    if count <= 20:
        middle = sum(image.get_clim()) / 2
        for row, column in values.nan_to_num().nonzero().tolist():
            value = float(values[row, column])
            color = "white" if value > middle else "black"  # both colour maps are dark for high values
            text = f"{value:.{decimals}f}".removesuffix(".0")
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
    return image
