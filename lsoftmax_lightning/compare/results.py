"""The finished runs of a comparison, as they lie in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml


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
        content: dict[str, Any] = torch.load(path, weights_only=True) if path.is_file() else {}
        return content

    def row(self) -> dict[str, Any]:
        """All that is known in numbers and words."""
        return {"margin": self.margin, **self.swept, "seed": self.seed, **self.results, **self.facts}


def read(folder: Path) -> Iterator[Done]:
    """The finished runs, in no order."""
    for path in folder.glob("*/run.json"):
        facts = json.loads(path.read_text())
        swept = dict(facts.pop("point"))
        yield Done(
            folder=path.parent,
            margin=swept.pop("margin"),
            seed=swept.pop("seed"),
            swept=swept,
            facts=facts,
            results=json.loads((path.parent / "results.json").read_text()),
            config=yaml.safe_load((path.parent / "config.yaml").read_text()),
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
