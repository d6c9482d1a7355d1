"""Finished runs of a comparison, from its folder or from a ``results.csv``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from ..atomic import from_csv_safe
from ..config_files import read_yaml
from ..errors import InputError
from .paper import paper_experiment

TRAINING_FACTS = {"data": "-", "train_size": "all", "label_noise": 0, "checkpoint": "last"}
"""Facts that are settings of a run, with their defaults. Runs in which they differ are not compared with each other."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        margin: m.
        seed: Seed of the training.
        settings: Values of the settings that ``--sweep`` and ``--average`` set, by name.
        metrics: Test metrics, and the validation metric that chose the checkpoint.
        facts: What it was trained on and with: data, steps, seconds, machine, versions, command.
        folder: Folder of the run; None if it was read from a ``results.csv``.
    """

    margin: int
    seed: int
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]
    folder: Path | None = None

    @property
    def averaged(self) -> list[str]:
        """Names of the settings that ``--average`` set."""
        return [name for name in str(self.facts.get("averaged", "")).split(", ") if name]

    @property
    def pair(self) -> tuple[str, ...]:
        """Seed and values of the averaged settings: what two paired runs share."""
        return (str(self.seed), *(str(self.settings[name]) for name in self.averaged))

    def value(self, name: str) -> Any:
        """Return the value of a setting, its default or "-" if it is not set. A float without a fraction is an int."""
        value = self.settings.get(name, self.facts.get(name, TRAINING_FACTS.get(name, "-")))
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def group(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the values of settings as texts."""
        return tuple(str(self.value(name)) for name in names)

    def record(self) -> dict[str, Any]:
        """Return the content of the :class:`~lsoftmax_lightning.dashboard.record.TestRecord`; empty without one."""
        if self.folder is None:
            return {}
        path = self.folder / "test.pt"
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True) if path.is_file() else {}
        except Exception as error:  # whatever the decoder meets in a damaged file
            rank_zero_warn(f"{path} cannot be read and is left out of the figures: {error or type(error).__name__}")
            return {}
        return content

    def row(self) -> dict[str, Any]:
        """Return the row of ``results.csv``."""
        settings = {name: "None" if value is None else value for name, value in self.settings.items()}
        return {"margin": self.margin, **settings, "seed": self.seed, **self.metrics, **self.facts}


def columns(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the columns of ``results.csv``: margin, settings, seed, metrics, facts."""
    settings = sorted({name for run in runs for name in run.settings})
    others = [name for kind in ("metrics", "facts") for run in runs for name in getattr(run, kind)]
    return list(dict.fromkeys(["margin", *settings, "seed", *others]))


def setting_names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the names of the settings that tell runs of a margin and a seed apart."""
    swept = sorted({name for run in runs for name in run.settings if name not in run.averaged})
    return [*swept, *(name for name in TRAINING_FACTS if len({str(run.value(name)) for run in runs}) > 1)]


def number(value: Any) -> float | None:
    """Return the value of a setting as a number, None if it is not one. YAML reads 1e-3 as a text."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def read(path: Path) -> Iterator[FinishedRun]:
    """Read finished runs, in no order.

    Args:
        path: Folder of a comparison, or a ``results.csv``.

    Raises:
        InputError: If the ``config.yaml`` of a run is missing or damaged, or the file is not a ``results.csv``.
    """
    if path.is_file():
        yield from _read_rows(path)
    for file in path.glob("*/run.json"):
        outcome = read_outcome(file.parent)
        if outcome is None:
            rank_zero_warn(f"{damaged_outcome(file.parent)} is missing or damaged; its run is left out.")
            continue
        facts, metrics = outcome
        settings = dict(facts.pop("point"))
        described = _described(_config(file.with_name("config.yaml")), metrics)
        yield FinishedRun(
            margin=settings.pop("margin"),
            seed=settings.pop("seed"),
            settings={name: value for name, value in settings.items() if not _is_fact(name)},
            metrics=metrics,
            facts={**described, **facts},
            folder=file.parent,
        )


def _is_fact(name: str) -> bool:
    """Return whether a swept setting, such as ``data.train_size``, is one of the facts already."""
    return name.replace(".init_args", "") in ("data", "data.train_size", "data.label_noise")


def _read_rows(path: Path) -> Iterator[FinishedRun]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = list(rows.fieldnames or ())
            swept = names[names.index("margin") + 1 : names.index("seed")]
            for row in rows:
                cells = {name: from_csv_safe(text) for name, text in row.items() if text}
                monitor = cells.get("checkpoint", "").partition(" of ")[2]
                metrics = [name for name in cells if "/" in name or name == monitor]
                facts = [name for name in cells if name not in ("margin", "seed", *swept, *metrics)]
                yield FinishedRun(
                    margin=int(cells["margin"]),
                    seed=int(cells["seed"]),
                    settings={name: _parsed(cells[name]) for name in swept if name in cells},
                    metrics={name: float(cells[name]) for name in metrics},
                    facts={name: _parsed(cells[name]) if name in TRAINING_FACTS else cells[name] for name in facts},
                )
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"--report: needs a folder or results.csv of compare, got {path}, which is another or a damaged file "
            f"({type(error).__name__}: {error})."
        ) from error


def _parsed(text: str) -> Any:
    """Return a number if the text is one as Python writes it, else the text."""
    for kind in (int, float):
        try:
            if str(kind(text)) == text:
                return kind(text)
        except ValueError:
            continue
    return text


def _described(config: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the facts that a table shows of the settings of a run, without those that are not set."""
    data, checkpoint = config["data"], config["checkpoint"]
    monitor = checkpoint.get("monitor")
    backbone = config["model"].get("init_args", {}).get("backbone")
    described = {
        "data": str(data.get("class_path")).rpartition(".")[2],
        "backbone": backbone.get("class_path") if isinstance(backbone, Mapping) else backbone,
        "batch_size": data.get("init_args", {}).get("batch_size"),
        **train_settings(config),
        "checkpoint": f"{checkpoint.get('mode')}imum of {monitor}" if monitor in metrics else "last",
        "paper": None if train_settings(config) else paper_experiment(config),
    }
    return {name: value for name, value in described.items() if value is not None}


def read_outcome(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the facts and the results of a run; None if it is not finished, or one of their files is damaged."""
    facts, results = (read_json(folder / name) for name in _OUTCOME)
    params = facts.get("point") if facts else None
    if facts is None or results is None or not isinstance(params, dict) or not {"margin", "seed"} <= params.keys():
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
    """Return the error for a finished run without its settings."""
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
