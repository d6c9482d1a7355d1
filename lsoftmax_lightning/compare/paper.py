"""The paper's results, to be shown beside ours, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .results import train_settings

# Accuracies in %, by margin. A star marks those that a second source confirms; the rest are recalled of the paper.
_ACCURACIES = {
    "MNIST": {1: "99.60*", 2: "99.68*", 3: "99.69*", 4: "99.69*"},
    "CIFAR10": {1: "90.95", 2: "92.27*", 3: "92.34", 4: "92.42"},
    "CIFAR10+": {1: "93.50", 2: "93.99", 3: "94.06", 4: "94.08"},
    "CIFAR100": {1: "67.26", 2: "70.05", 3: "70.13", 4: "70.47"},
    "LFW": {1: "96.53", 2: "97.81", 3: "98.27", 4: "98.71*"},
}
_EXPERIMENTS = {  # by data and backbone
    ("MNISTDataModule", "mnist"): "MNIST",
    ("CIFAR10DataModule", "cifar10"): "CIFAR10",
    ("CIFAR100DataModule", "cifar100"): "CIFAR100",
    ("LFWDataModule", "lfw"): "LFW",
}


def paper_accuracies(config: Mapping[str, Any]) -> tuple[dict[int, str], str] | None:
    """What the paper reports for these data and this network.

    Args:
        config: All settings of a run.

    Returns:
        By margin, the accuracy in % with a star where it is confirmed, and a line on their source; nothing for
        experiments that are not the paper's, or with fewer training images or label noise.
    """
    data, model = (config[part].get("init_args", {}) for part in ("data", "model"))
    name = _EXPERIMENTS.get((config["data"]["class_path"].rpartition(".")[2], str(model.get("backbone"))))
    if name == "CIFAR10" and (data.get("crop_padding") or data.get("flip")):
        name = "CIFAR10+"
    if name is None or train_settings(config):
        return None
    return _ACCURACIES[name], (
        f"Paper: Liu et al., ICML 2016, {name} column of its results, from 18,000 steps of 256 images (LFW: trained on "
        "CASIA-WebFace); * as quoted in a second source, the others as recalled: check the paper."
    )
