"""Accuracies that the paper reports, from ``paper_accuracies.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def _paper() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(
        Path(__file__).with_name("paper_accuracies.yaml").read_text(encoding="utf-8")
    )
    return content


def paper_experiment(config: Mapping[str, Any]) -> str | None:
    """Return the experiment of the paper with the data and the backbone of a run; None if there is none.

    Args:
        config: All settings of the run.
    """
    data, model = (config[part].get("init_args", {}) for part in ("data", "model"))
    datamodule = str(config["data"].get("class_path")).rpartition(".")[2]
    augmented = bool(data.get("crop_padding") or data.get("flip"))
    for name, experiment in _paper()["experiments"].items():
        if (
            datamodule == experiment["datamodule"]
            and model.get("backbone") == experiment["backbone"]
            and augmented == experiment.get("augmented", augmented)
        ):
            return str(name)
    return None


def paper_accuracy(experiment: str | None, margin: int) -> str:
    """Return an accuracy in %, with a star if a second source confirms it; "-" if the paper has none."""
    results = _paper()["experiments"].get(experiment)
    if results is None or margin not in results["accuracies"]:
        return "-"
    star = "*" if margin in results["confirmed"] else ""
    return f"{results['accuracies'][margin]:.2f}{star}"


def paper_source(experiment: str) -> str:
    """Return the source of the accuracies of an experiment."""
    paper = _paper()
    return (
        f"Paper: {paper['source']}, {experiment} column of its results, from {paper['training']}; {paper['certainty']}."
    )
