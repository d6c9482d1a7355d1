"""The finished runs of a comparison, as they lie in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from ..errors import InputError
from ..lightning_cli import read_yaml


@dataclass(frozen=True)
class Done:
    """A finished run.

    Attributes:
        folder: Where it is.
        margin: m.
        seed: Of the training.
        swept: The swept settings and their values.
        facts: Steps, seconds, machine, versions, command.
        results: Figures of the test, and that of validation which chose the checkpoint.
        config: All settings.
    """

    folder: Path
    margin: int
    seed: int
    swept: Mapping[str, Any]
    facts: Mapping[str, Any]
    results: Mapping[str, float]
    config: Mapping[str, Any]

    @property
    def setting(self) -> str:
        """The swept values in words."""
        return ", ".join(f"{key} = {value}" for key, value in self.swept.items())

    def record(self) -> dict[str, Any]:
        """What :class:`~lsoftmax_lightning.compare.record.TestRecord` has left, if anything."""
        path = self.folder / "test.pt"
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True) if path.is_file() else {}
        except Exception as error:  # whatever the decoder meets in a damaged file
            rank_zero_warn(f"{path} cannot be read and is left out of the figures: {error or type(error).__name__}")
            return {}
        return content

    def row(self) -> dict[str, Any]:
        """All that is known in numbers and words."""
        return {"margin": self.margin, **self.swept, "seed": self.seed, **self.results, **self.facts}


def read(folder: Path) -> Iterator[Done]:
    """The finished runs, in no order.

    Raises:
        InputError: If the ``config.yaml`` of one is missing or damaged.
    """
    for path in folder.glob("*/run.json"):
        outcome = read_outcome(path.parent)
        if outcome is None:
            rank_zero_warn(f"{damaged_outcome(path.parent)} is missing or damaged; its run is left out.")
            continue
        facts, results = outcome
        swept = dict(facts.pop("point"))
        yield Done(
            folder=path.parent,
            margin=swept.pop("margin"),
            seed=swept.pop("seed"),
            swept=swept,
            facts=facts,
            results=results,
            config=_config(path.with_name("config.yaml")),
        )


def read_outcome(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the facts and the results of a run; None if it is not finished, or one of their files is damaged."""
    facts, results = (read_json(folder / name) for name in _OUTCOME)
    point = facts.get("point") if facts else None
    if facts is None or results is None or not isinstance(point, dict) or not {"margin", "seed"} <= point.keys():
        return None
    return facts, results


def damaged_outcome(folder: Path) -> Path | None:
    """Return the damaged file of a run that was finished; None if there is none."""
    if not (folder / "run.json").exists() or read_outcome(folder) is not None:
        return None
    return next((folder / name for name in _OUTCOME if read_json(folder / name) is None), folder / "run.json")


_OUTCOME = ("run.json", "results.json")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file; None if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: neither UTF-8 nor JSON
        return None
    return content if isinstance(content, dict) else None


def _config(path: Path) -> dict[str, Any]:
    """Return the settings of a finished run."""
    config = read_yaml(path)
    if config is None or not {"checkpoint", "data", "model"} <= set(config):
        raise damaged_config(path)
    return config


def damaged_config(path: Path) -> InputError:
    """The error for a finished run without its settings."""
    return InputError(
        f"{path} is missing or damaged, but its run is finished; restore the file, or remove {path.parent} to train "
        "that run again."
    )


def train_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``train_size`` and ``label_noise`` of a run, where they are set.

    Args:
        config: All settings of the run.
    """
    data = config["data"].get("init_args", {})
    return {name: data[name] for name in ("train_size", "label_noise") if data.get(name)}


def file_name(text: str) -> str:
    """A text that is fit to name a file."""
    return re.sub(r"[^\w.,+=-]", "_", text)
