"""The plots of a snapshot. To add one, write a function here and append it to a list at the end of this file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from ..geometry import degrees, segment_counts
from . import plots
from .snapshots import ClassSnapshot, PairSnapshot, Snapshot

_Kind = TypeVar("_Kind", bound=Snapshot)


class Plot(NamedTuple):
    """A figure and its data."""

    name: str
    """Tag on TensorBoard, and part of the file names."""
    figure: Figure
    """Figure of matplotlib."""
    header: Sequence[str]
    """Name of each column of ``rows``."""
    rows: Iterable[Sequence[Any]]
    """Rows of the CSV file."""


def draw(snapshot: Snapshot) -> Iterator[Plot]:
    """Draw the plots of a snapshot, one by one."""
    yield from _draw(_PANELS, snapshot)
    if isinstance(snapshot, ClassSnapshot):
        yield from _draw(_CLASS_PANELS, snapshot)
    if isinstance(snapshot, PairSnapshot):
        yield from _draw(_PAIR_PANELS, snapshot)


def _draw(panels: Sequence[Callable[[_Kind], Plot | None]], snapshot: _Kind) -> Iterator[Plot]:
    for panel in panels:
        with rc_context({"figure.dpi": plots.DPI}):
            plot = panel(snapshot)
        if plot is not None:
            yield plot


def _angles(snapshot: Snapshot) -> Plot | None:
    angles = snapshot.angles_by_stage() | dict(snapshot.baseline)
    if not any(map(len, angles.values())):  # a test on pairs of images has none
        return None
    boundaries = {"boundary of softmax": snapshot.nearest_angle / 2}
    if snapshot.margin > 1:
        boundaries[f"boundary of m = {snapshot.margin}"] = snapshot.nearest_angle / (snapshot.margin + 1)
    figure = plots.angle_histogram(angles, boundaries, snapshot.title("angle to the true class"))
    rows = ((name, angle) for name, values in angles.items() for angle in values.tolist())
    return Plot("angles", figure, ("stage", "degrees"), rows)


def _segments(snapshot: Snapshot) -> Plot | None:
    fractions = {
        stage: segment_counts(angles, snapshot.margin) / len(angles)
        for stage, angles in snapshot.angles_by_stage().items()
        if len(angles)
    }
    if snapshot.margin == 1 or not fractions:
        return None
    figure = plots.segment_bars(fractions, snapshot.title("samples by segment of psi"))
    rows = [(stage, k, value) for stage, values in fractions.items() for k, value in enumerate(values.tolist())]
    return Plot("segments", figure, ("stage", "segment", "fraction"), rows)


def _features(snapshot: ClassSnapshot) -> Plot:
    names, points, rays, target = snapshot.scatter()
    title = _class_title(snapshot, "features")
    figure = plots.feature_scatter(points, rays, target, names, title, projected=snapshot.features.shape[1] != 2)
    rows = [(*point, names[c]) for point, c in zip(points.tolist(), target.tolist(), strict=True) if c >= 0]
    return Plot("features", figure, ("x", "y", "class"), rows)


def _class_angles(snapshot: ClassSnapshot) -> Plot:
    names = _shown_names(snapshot)
    unit = normalize(snapshot.weight)
    angles = degrees(unit @ unit.T).fill_diagonal_(0)
    figure = plots.angle_map(angles, names, _class_title(snapshot, "angles between the weights"))
    return Plot("class_angles", figure, ("class", *names), _matrix_rows(names, angles))


def _confusion(snapshot: ClassSnapshot) -> Plot:
    names = _shown_names(snapshot)
    counts, _ = snapshot.confusion_counts()
    figure = plots.confusion(counts, names, "images", _class_title(snapshot, "confusion"))
    return Plot("confusion", figure, ("true class", *names), _matrix_rows(names, counts))


def _confusion_percent(snapshot: ClassSnapshot) -> Plot:
    names = _shown_names(snapshot)
    percent = plots.percent_of_rows(*snapshot.confusion_counts())
    title = _class_title(snapshot, "confusion in % of the true class")
    figure = plots.confusion(percent, names, "% of the true class", title)
    return Plot("confusion_percent", figure, ("true class", *names), _matrix_rows(names, percent))


def _most_confused(snapshot: ClassSnapshot) -> Plot | None:
    confused, names = snapshot.confused, snapshot.class_names
    is_mistake = confused.confidence_gap > 0
    if not is_mistake.any():
        return None
    rows = [
        (names[target], names[prediction], gap, angle, snapshot.image_id(index))
        for target, prediction, gap, angle, index in zip(
            confused.target[is_mistake].tolist(),
            confused.prediction[is_mistake].tolist(),
            confused.confidence_gap[is_mistake].tolist(),
            confused.angles[is_mistake].tolist(),
            confused.image_index[is_mistake].tolist(),
            strict=True,
        )
    ]
    captions = [
        f"{target}\ntaken for {prediction}\n{angle:.0f}°, {_short(image)}"
        for target, prediction, _, angle, image in rows
    ]
    figure = plots.image_strip(confused.images[is_mistake], captions, snapshot.title("most confused"))
    return Plot("most_confused", figure, ("true class", "predicted class", "confidence gap", "degrees", "image"), rows)


def _roc(snapshot: PairSnapshot) -> Plot:
    title = snapshot.title(f"ROC curve of {len(snapshot.same)} pairs")
    figure = plots.roc({"pairs": (snapshot.cosines, snapshot.same)}, title)
    return Plot("roc", figure, _PAIR_HEADER, _pair_rows(snapshot))


def _pair_angles(snapshot: PairSnapshot) -> Plot:
    angles = degrees(snapshot.cosines)
    by_kind = {"same": angles[snapshot.same], "different": angles[~snapshot.same]}
    figure = plots.angle_histogram(by_kind, {}, snapshot.title("angle between two images"))
    return Plot("pair_angles", figure, _PAIR_HEADER, _pair_rows(snapshot))


def _hardest_pairs(snapshot: PairSnapshot) -> Plot | None:
    if snapshot.images is None:
        return None
    all_rows = _pair_rows(snapshot)
    rows = [
        (*all_rows[index], *map(snapshot.image_id, pair))
        for index, pair in zip(snapshot.hardest.tolist(), snapshot.hardest_pairs.tolist(), strict=True)
    ]
    captions = [
        f"{'same' if same else 'different'}: {angle:.0f}°\n{_short(first)}\n{_short(second)}"
        for _, angle, same, first, second in rows
    ]
    figure = plots.image_strip(snapshot.images, captions, snapshot.title("hardest pairs"))
    return Plot("hardest_pairs", figure, (*_PAIR_HEADER, "first", "second"), rows)


_PAIR_HEADER = ("cosine", "degrees", "same")


def _pair_rows(snapshot: PairSnapshot) -> list[tuple[float, float, bool]]:
    columns = (snapshot.cosines, degrees(snapshot.cosines), snapshot.same)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _short(image: str) -> str:
    """Return a name of an image that is short enough for a caption."""
    return f"image {image}" if image.isdecimal() else Path(image).name[-22:]


def _matrix_rows(names: Sequence[str], matrix: Tensor) -> Iterable[Sequence[Any]]:
    return ((name, *values) for name, values in zip(names, matrix.tolist(), strict=True))


def _shown_names(snapshot: ClassSnapshot) -> list[str]:
    return [snapshot.class_names[index] for index in snapshot.shown]


def _class_title(snapshot: ClassSnapshot, subject: str) -> str:
    """Return the title of a plot that may show only some of the classes."""
    if len(snapshot.shown) < len(snapshot.class_names):
        subject += f" of {len(snapshot.shown)} of {len(snapshot.class_names)} classes"
    return snapshot.title(subject)


_PANELS = (_angles, _segments)
_CLASS_PANELS = (_features, _class_angles, _confusion, _confusion_percent, _most_confused)
_PAIR_PANELS = (_roc, _pair_angles, _hardest_pairs)
