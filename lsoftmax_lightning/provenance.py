"""Machine and package versions, to report with measurements."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("lsoftmax-lightning", "torch", "torchvision", "lightning", "torchmetrics", "scikit-learn")


def machine_and_versions() -> dict[str, str]:
    """Return the processors and GPUs of this machine, and the versions of Python and the packages."""
    cpu = f"{os.cpu_count()} cores of {processor_name()}"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": ", ".join([cpu, *gpus]),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def processor_name() -> str:
    """Return the model name of the processor, or its architecture if the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
