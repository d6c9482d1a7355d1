"""What the benchmarks share: description of the machine, alternating timing of steps, and tables."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version

import torch

from lsoftmax_lightning.compare.text import markdown_table
from lsoftmax_lightning.provenance import processor_name

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics")


def machine(*packages: str) -> str:
    """Describe processor, GPU, threads and versions, also those of further packages."""
    processor = processor_name()
    if torch.cuda.is_available():
        processor += f" and {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {version(name)}" for name in (*PACKAGES, *packages))
    return f"{processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown that an empty line follows when it is printed."""
    return markdown_table(header, rows) + "\n"


def in_turn(
    steps: dict[str, Callable[[], object]], lasting: float, warm_up: int = 2, least: int = 9
) -> dict[str, list[float]]:
    """Seconds of each step in each round, in which all are run one after the other.

    Args:
        steps: By name.
        lasting: Seconds that all rounds are to take.
        warm_up: Rounds that are not counted.
        least: Rounds that are, however long they take.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    began, round_ = time.perf_counter(), -warm_up
    while round_ < least or time.perf_counter() - began < lasting:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        round_ += 1
    return {name: own[warm_up:] for name, own in times.items()}


def ratio(times: Sequence[float], floor: Sequence[float]) -> str:
    """Median and quartiles of the ratios within rounds."""
    lower, median, upper = statistics.quantiles([a / b for a, b in zip(times, floor, strict=True)], n=4)
    return f"{median:.2f} ({lower:.2f} .. {upper:.2f})"
