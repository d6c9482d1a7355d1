"""Accuracies that the paper reports, and how certain they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER_ACCURACIES = {
    "MNIST": {1: "99.60*", 2: "99.68*", 3: "99.69*", 4: "99.69*"},
    "CIFAR10": {1: "90.95", 2: "92.27*", 3: "92.34", 4: "92.42"},
    "CIFAR10+": {1: "93.50", 2: "93.99", 3: "94.06", 4: "94.08"},
    "CIFAR100": {1: "67.26", 2: "70.05", 3: "70.13", 4: "70.47"},
    "LFW": {1: "96.53", 2: "97.81", 3: "98.27", 4: "98.71*"},
}
"""In %, by margin. A star marks those that a second source confirms; the others are as recalled."""
_EXPERIMENTS = {  # by data and backbone
    ("MNISTDataModule", "mnist"): "MNIST",
    ("CIFAR10DataModule", "cifar10"): "CIFAR10",
    ("CIFAR100DataModule", "cifar100"): "CIFAR100",
    ("LFWDataModule", "lfw"): "LFW",
}


def paper_experiment(config: Mapping[str, Any]) -> str | None:
    """Return the experiment of the paper with the data and the network of a run; None if there is none.

    Args:
        config: All settings of the run.
    """
    data, model = (config[part].get("init_args", {}) for part in ("data", "model"))
    name = _EXPERIMENTS.get((str(config["data"].get("class_path")).rpartition(".")[2], str(model.get("backbone"))))
    if name == "CIFAR10" and (data.get("crop_padding") or data.get("flip")):
        return "CIFAR10+"
    return name


def paper_source(name: str) -> str:
    """Return where the accuracies of an experiment are from."""
    return (
        f"Paper: Liu et al., ICML 2016, {name} column of its results, from 18,000 steps of 256 images (LFW: trained on "
        "CASIA-WebFace); * as quoted in a second source, the others as recalled: check the paper."
    )
