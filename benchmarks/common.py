"""Shared by the benchmarks: description of the machine, interleaved timing of steps, and tables."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version

import numpy as np
import torch

from lsoftmax_lightning.compare.text import markdown_table
from lsoftmax_lightning.provenance import processor_name

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics")


def machine(*packages: str) -> str:
    """Describe processor, GPU, threads, and versions of the main and further packages."""
    processor = processor_name()
    if torch.cuda.is_available():
        processor += f" and {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {version(name)}" for name in (*PACKAGES, *packages))
    return f"{processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown, with an empty line after it."""
    return markdown_table(header, rows) + "\n"


def time_interleaved(
    steps: dict[str, Callable[[], object]], duration: float, warm_up: int = 2, min_rounds: int = 9
) -> dict[str, list[float]]:
    """Return the seconds of each step in each round; a round runs all steps one after the other.

    Args:
        steps: Steps by name.
        duration: Seconds for all rounds.
        warm_up: Number of rounds that are not counted.
        min_rounds: Minimum number of counted rounds, however long they take.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    start_of_rounds, round_ = time.perf_counter(), -warm_up
    while round_ < min_rounds or time.perf_counter() - start_of_rounds < duration:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        round_ += 1
    return {name: seconds[warm_up:] for name, seconds in times.items()}


def ratio(times: Sequence[float], floor: Sequence[float]) -> str:
    """Format median and quartiles of the ratios within rounds."""
    lower, median, upper = np.quantile([a / b for a, b in zip(times, floor, strict=True)], [0.25, 0.5, 0.75])
    return f"{median:.2f} ({lower:.2f} .. {upper:.2f})"
