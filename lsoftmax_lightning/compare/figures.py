"""Figures of a comparison."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import cycle
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..dashboard import plots
from ..dashboard.plots import COLORS
from ..geometry import degrees
from .intervals import half_interval, paired_differences, standard_deviation
from .results import FinishedRun, as_float, setting_names

_CURVES = {"lambda": "symlog", "train/loss": "log", "val/loss": "log", "val/acc": "linear"}


def draw(runs: Sequence[FinishedRun]) -> Iterator[tuple[str, Figure]]:
    """Yield names and figures: the accuracy of all runs, then curves and test results of each setting.

    Args:
        runs: Finished runs, sorted by setting and margin.
    """
    names = setting_names(runs)
    settings = _grouped(runs, lambda run: _label(run, names))
    yield "accuracy", _accuracy(settings)
    if axis := _numeric_setting(runs, names):
        yield f"accuracy_by_{axis}", _accuracy_by(axis, runs, [name for name in names if name != axis])
    for setting, same_settings in settings.items():
        suffix = f"-{setting.replace(' ', '')}" if setting else ""
        in_folders = [run for run in same_settings if run.folder]
        by_margin = _grouped(in_folders, lambda run: f"m = {run.margin}")
        if by_margin:
            yield f"curves{suffix}", _curves(by_margin, setting)
        for name, figure in _tests(by_margin, setting):
            yield name + suffix, figure


def _label(run: FinishedRun, names: Sequence[str]) -> str:
    return ", ".join(f"{name} = {run.value(name)}" for name in names if run.value(name) not in ("-", "last"))


def _grouped(runs: Sequence[FinishedRun], key: Callable[[FinishedRun], str]) -> dict[str, list[FinishedRun]]:
    groups = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups


def _accuracy(settings: Mapping[str, Sequence[FinishedRun]]) -> Figure:
    """Draw the test accuracy by margin: each run, mean and standard deviation."""
    figure = Figure(figsize=(6, 4.5 + 0.25 * len(settings)), layout="constrained")
    axes = figure.add_subplot(xlabel="margin m", ylabel="test accuracy, %: runs, mean ± standard deviation")
    for index, (setting, runs) in enumerate(settings.items()):
        color, shift = COLORS[index % 10], 0.5 / len(settings) * (index - (len(settings) - 1) / 2)
        values = defaultdict(list)
        for run in runs:
            if "test/acc" in run.metrics:
                values[run.margin + shift].append(100 * run.metrics["test/acc"])
                axes.plot(run.margin + shift, values[run.margin + shift][-1], ".", color=color, alpha=0.35)
        means = [statistics.fmean(group) for group in values.values()]
        spreads = [standard_deviation(group) if len(group) > 1 else math.nan for group in values.values()]
        axes.errorbar(list(values), means, spreads, color=color, marker="o", capsize=4, label=setting or "default")
    axes.set_xticks(sorted({run.margin for runs in settings.values() for run in runs}))
    axes.grid(alpha=0.3)
    if len(settings) > 1:
        figure.legend(frameon=False, loc="outside lower center")
    return figure


def _numeric_setting(runs: Sequence[FinishedRun], names: Sequence[str]) -> str | None:
    """Return the setting with the most numeric values, at least three; None if there is none."""
    tested = [run for run in runs if "test/acc" in run.metrics]
    numbers = {name: {_position(run, name) for run in tested} - {None} for name in names}
    name = max(names, key=lambda name: len(numbers[name]), default=None)
    return name if name and len(numbers[name]) > 2 else None


def _position(run: FinishedRun, axis: str) -> float | None:
    """Return the position of a run on an axis, None if its value is not a finite number."""
    value = as_float(run.value(axis))
    return value if value is not None and math.isfinite(value) else None


def _accuracy_by(axis: str, runs: Sequence[FinishedRun], others: Sequence[str]) -> Figure:
    """Draw the test accuracy by a setting, and its difference to m = 1: a curve for each margin."""
    left_out = {str(run.value(axis)): None for run in runs if _position(run, axis) is None}
    if left_out:
        rank_zero_warn(f"accuracy_by_{axis} leaves out runs in which {axis} is {' or '.join(left_out)}.")
    points: dict[str, dict[float, list[FinishedRun]]] = defaultdict(lambda: defaultdict(list))
    baselines = {}  # label of the curve at m = 1 that a curve is compared with
    for run in runs:
        x = _position(run, axis)
        if x is not None and "test/acc" in run.metrics:
            label, baseline = (", ".join(filter(None, [f"m = {m}", _label(run, others)])) for m in (run.margin, 1))
            points[label][x].append(run)
            baselines[label] = baseline
    softmax = next((label for label, baseline in baselines.items() if label == baseline), None)

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    accuracy, difference = figure.subplots(1, 2)
    accuracy.set(ylabel="test accuracy, %, with 95 % interval")
    difference.set(ylabel="difference to m = 1, points, with 95 % interval")
    difference.axhline(0, color="gray", linewidth=1)
    for index, (label, curve) in enumerate(points.items()):
        style = {"color": COLORS[index % len(COLORS)], "marker": "o", "capsize": 3, "label": label}
        # equal values of two curves must not hide each other
        shift = 20 / len(points) * (index - (len(points) - 1) / 2)
        reference = baselines[label] if baselines[label] != label else softmax
        accuracies = {x: [100 * run.metrics["test/acc"] for run in group] for x, group in curve.items()}
        _errorbars(accuracy, accuracies, style, shift)
        if reference in points and reference != label:
            base = points[reference]
            differences = {x: paired_differences(group, base[x]) for x, group in curve.items() if x in base}
            _errorbars(difference, differences, style, shift)
    ticks = sorted({x for curve in points.values() for x in curve})
    for axes in (accuracy, difference):
        axes.set(xlabel=axis, xscale="log" if ticks[0] > 0 and ticks[-1] >= 10 * ticks[0] else "linear")
        axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        axes.margins(x=0.08)  # room for the shifts
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    accuracy.legend(frameon=False)
    return figure


def _errorbars(axes: Axes, samples: Mapping[float, Sequence[float]], style: Mapping[str, Any], shift: float) -> None:
    """Draw means with their 95 % intervals, ``shift`` points (1/72 inch) to the right."""
    drawn = {x: sample for x, sample in sorted(samples.items()) if sample}
    if drawn:
        halves = [half_interval(sample) for sample in drawn.values()]
        bars = axes.errorbar(list(drawn), list(map(statistics.fmean, drawn.values())), halves, **style)
        transform = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
        for artist in bars.get_children():
            artist.set_transform(transform)  # after errorbar(), which computes the axis limits from unshifted curves


def _curves(runs: Mapping[str, Sequence[FinishedRun]], title: str) -> Figure:
    """Draw lambda, losses and accuracy by step: mean, minimum and maximum over the seeds."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    panels = dict(zip(_CURVES, figure.subplots(2, 2).flat, strict=True))
    for tag, axes in panels.items():
        axes.set(title=tag, xlabel="step", yscale=_CURVES[tag])
        axes.grid(alpha=0.3)
    for color, (label, group) in zip(cycle(COLORS), runs.items(), strict=False):
        curves: dict[str, dict[int, list[float]]] = {tag: defaultdict(list) for tag in panels}
        for run in group:
            events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0, "images": 1}).Reload()
            for tag in set(curves) & set(events.Tags()["scalars"]):
                for step, value in {event.step: event.value for event in events.Scalars(tag)}.items():
                    curves[tag][step].append(value)
        if all(run.margin == 1 for run in group):
            curves["lambda"].clear()  # it has no effect
        for tag, curve in curves.items():
            steps = sorted(curve)
            if not steps:
                continue
            panels[tag].plot(steps, [statistics.fmean(curve[step]) for step in steps], color=color, label=label)
            lower, upper = ([bound(curve[step]) for step in steps] for bound in (min, max))
            panels[tag].fill_between(steps, lower, upper, color=color, alpha=0.15, linewidth=0)
    drawn = [axes for axes in panels.values() if axes.lines]
    for axes in panels.values():
        axes.set_visible(axes in drawn)
    if drawn:
        max(drawn, key=lambda axes: len(axes.lines)).legend(frameon=False)
    return figure


def _tests(runs: Mapping[str, Sequence[FinishedRun]], title: str) -> Iterator[tuple[str, Figure]]:
    """Draw the test results, one panel for each margin; feature and pair plots show the first seed."""
    records = {label: [record for run in group if (record := run.record())] for label, group in runs.items()}
    records = {label: group for label, group in records.items() if group}
    names = {name for group in records.values() for name in group[0]}
    first_seed = f"{title}, first seed".removeprefix(", ")
    if "points" in names:
        first = next(iter(records.values()))[0]
        shown, total = len(first["class_names"]), first.get("num_classes", 0)  # earlier records do not have it
        of_classes = f", {shown} of {total} classes" if total > shown else ""
        figure, panels = _side_by_side(records, first_seed + of_classes)
        for (label, (first, *_)), axes in zip(records.items(), panels, strict=True):
            points, rays, target = (first[name] for name in ("points", "rays", "points_target"))
            projected = first.get("projected", False)  # records of earlier versions do not have it
            plots.feature_scatter(points, rays, target, first["class_names"], label, axes, projected)
        limit = max(axes.get_xlim()[1] for axes in panels)
        for axes in panels:
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
        yield "features", figure
        figure, panels = _side_by_side(records, f"{title}{of_classes}".removeprefix(", "), max(5.5, 0.13 * shown))
        for (label, group), axes in zip(records.items(), panels, strict=True):
            class_names = group[0]["class_names"]
            same_classes = [record["counts"] for record in group if record["class_names"] == class_names]
            counts = torch.stack(same_classes).sum(0)
            summed = "1 run" if len(same_classes) == 1 else f"{len(same_classes)} runs"
            plots.confusion(counts, class_names, f"images, {summed}", label, axes)
        yield "confusion", figure
        angles = {label: torch.cat([record["angles"] for record in group]) for label, group in records.items()}
        yield "angles", plots.angle_histogram(angles, {}, f"angle to the true class, test {title}".strip())
    if "cosines" in names:
        pairs = {label: (group[0]["cosines"], group[0]["same"]) for label, group in records.items()}
        yield "roc", plots.roc(pairs, first_seed)
        figure, panels = _side_by_side(records, first_seed)
        for (label, (cosines, same)), axes in zip(pairs.items(), panels, strict=True):
            between = degrees(cosines)
            plots.angle_histogram({"same": between[same], "different": between[~same]}, {}, label, axes)
        yield "pair_angles", figure


def _side_by_side(labels: Sized, title: str, side: float = 5.5) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(side * len(labels), side + 0.5), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(1, len(labels), squeeze=False).flat)
