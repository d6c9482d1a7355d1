"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("lsoftmax-lightning", "torch", "torchvision", "lightning", "torchmetrics", "scikit-learn")


def provenance() -> dict[str, str]:
    """The machine and the versions, to be kept beside a figure."""
    cpu = f"{os.cpu_count()} cores of {_processor()}"
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "machine": ", ".join([cpu, *gpus]),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
