"""The figures of a comparison, from what its runs have left."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import cycle

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .. import pictures
from ..functional import degrees
from ..pictures import COLORS
from .results import Done

_CURVES = {"lambda": "symlog", "train/loss": "log", "val/loss": "log", "val/acc": "linear"}


def draw(runs: Sequence[Done]) -> Iterator[tuple[str, Figure]]:
    """Names and figures: the accuracy of all runs by margin, and what else there is of each swept setting.

    Args:
        runs: Finished runs, in the order of their margins.
    """
    yield "accuracy", _accuracy(runs)
    for setting, alike in _grouped(runs, lambda run: run.setting).items():
        of = f"-{setting.replace(' ', '')}" if setting else ""
        by_margin = _grouped(alike, lambda run: f"m = {run.margin}")
        yield f"curves{of}", _curves(by_margin, setting)
        for name, figure in _tests(by_margin, setting):
            yield name + of, figure


def _grouped(runs: Sequence[Done], name: Callable[[Done], str]) -> dict[str, list[Done]]:
    groups = defaultdict(list)
    for run in runs:
        groups[name(run)].append(run)
    return groups


def _accuracy(runs: Sequence[Done]) -> Figure:
    """Test accuracy by margin: a dot for each run, mean and standard deviation."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="margin m", ylabel="test accuracy, %: runs, mean ± standard deviation")
    settings = _grouped([run for run in runs if "test/acc" in run.results], lambda run: run.setting)
    for number, (setting, alike) in enumerate(settings.items()):
        color, shift = COLORS[number % 10], 0.5 / len(settings) * (number - (len(settings) - 1) / 2)
        values = defaultdict(list)
        for run in alike:
            values[run.margin + shift].append(100 * run.results["test/acc"])
            axes.plot(run.margin + shift, values[run.margin + shift][-1], ".", color=color, alpha=0.35)
        means = [statistics.fmean(own) for own in values.values()]
        spreads = [statistics.stdev(own) if len(own) > 1 else 0 for own in values.values()]
        axes.errorbar(list(values), means, spreads, color=color, marker="o", capsize=4, label=setting)
    axes.set_xticks(sorted({run.margin for run in runs}))
    axes.grid(alpha=0.3)
    if len(settings) > 1:
        axes.legend(frameon=False)
    return figure


def _curves(runs: Mapping[str, Sequence[Done]], title: str) -> Figure:
    """lambda, losses and accuracy over the training: the mean over seeds, and from the least to the most."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    panels = dict(zip(_CURVES, figure.subplots(2, 2).flat, strict=True))
    for tag, axes in panels.items():
        axes.set(title=tag, xlabel="step", yscale=_CURVES[tag])
        axes.grid(alpha=0.3)
    for color, (label, own) in zip(cycle(COLORS), runs.items(), strict=False):
        curves: dict[str, dict[int, list[float]]] = {tag: defaultdict(list) for tag in panels}
        for run in own:
            events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0, "images": 1}).Reload()
            for tag in set(curves) & set(events.Tags()["scalars"]):
                for step, value in {event.step: event.value for event in events.Scalars(tag)}.items():
                    curves[tag][step].append(value)
        for tag, curve in curves.items():
            steps = sorted(curve)
            if not steps:
                continue
            panels[tag].plot(steps, [statistics.fmean(curve[step]) for step in steps], color=color, label=label)
            least, most = ([end(curve[step]) for step in steps] for end in (min, max))
            panels[tag].fill_between(steps, least, most, color=color, alpha=0.15, linewidth=0)
    drawn = [axes for axes in panels.values() if axes.lines]
    for axes in panels.values():
        axes.set_visible(axes in drawn)
    for axes in drawn[:1]:
        axes.legend(frameon=False)
    return figure


def _tests(runs: Mapping[str, Sequence[Done]], title: str) -> Iterator[tuple[str, Figure]]:
    """What the tests have left, the margins side by side; scatters and pairs are of the first seed."""
    records = {label: [record for run in own if (record := run.record())] for label, own in runs.items()}
    records = {label: own for label, own in records.items() if own}
    kinds = {name for own in records.values() for name in own[0]}
    first_seed = f"{title}, first seed".removeprefix(", ")
    if "points" in kinds:
        figure, panels = _side_by_side(records, first_seed)
        for (label, (first, *_)), axes in zip(records.items(), panels, strict=True):
            points, rays, target = (first[name] for name in ("points", "rays", "points_target"))
            pictures.feature_scatter(points, rays, target, first["class_names"], label, axes)
        limit = max(axes.get_xlim()[1] for axes in panels)
        for axes in panels:
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
        yield "features", figure
        classes = len(next(iter(records.values()))[0]["class_names"])
        figure, panels = _side_by_side(records, title, max(5.5, 0.13 * classes))
        for (label, own), axes in zip(records.items(), panels, strict=True):
            counts = torch.stack([record["counts"] for record in own]).sum(0)
            pictures.confusion(counts, own[0]["class_names"], f"images, {len(own)} seeds", label, axes)
        yield "confusion", figure
        angles = {label: torch.cat([record["angles"] for record in own]) for label, own in records.items()}
        yield "angles", pictures.angle_histogram(angles, {}, f"angle to the own class, test {title}".strip())
    if "cosines" in kinds:
        pairs = {label: (own[0]["cosines"], own[0]["same"]) for label, own in records.items()}
        yield "roc", pictures.roc(pairs, first_seed)
        figure, panels = _side_by_side(records, first_seed)
        for (label, (cosines, same)), axes in zip(pairs.items(), panels, strict=True):
            between = degrees(cosines)
            pictures.angle_histogram({"same": between[same], "different": between[~same]}, {}, label, axes)
        yield "pair_angles", figure


def _side_by_side(labels: Sized, title: str, side: float = 5.5) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(side * len(labels), side), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(1, len(labels), squeeze=False).flat)
