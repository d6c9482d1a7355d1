"""Finished runs of a comparison, read from its folder or from a ``results.csv``."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from ..atomic import from_csv_safe
from ..config_files import read_yaml, setting_name
from ..errors import InputError
from .paper import paper_experiment

TRAINING_FACTS = {"data": "-", "train_size": "all", "label_noise": 0, "checkpoint": "last"}
"""Facts that are settings of a run, with their defaults. Runs with different values are not compared."""
COMPARISON_OPTIONS = {"margins", "seeds", "sweep", "average", "jobs", "folder", "html"}
"""Options of ``compare`` that do not affect a single run."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        margin: m.
        seed: Seed of the training.
        settings: Values of the settings of ``--sweep`` and ``--average``, by name.
        metrics: Test metrics, and the validation metric that chose the checkpoint.
        facts: Circumstances of the training: data, steps, seconds, machine, versions, command.
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
        """Names of the settings of ``--average``."""
        return [column_name(name) for name in str(self.facts.get("averaged", "")).split(", ") if name]

    @property
    def pairing_key(self) -> tuple[str, ...]:
        """Seed and values of the averaged settings, which two paired runs share."""
        return (str(self.seed), *self.group_key(self.averaged))

    @property
    def command_settings(self) -> dict[str, str]:
        """Number of steps, and the settings given on the command line, by name."""
        settings = {"steps": [str(self.value("steps"))]}
        values: list[str] = []
        for word in self._words():
            if word.startswith("--"):
                name, *value = word[2:].split("=", 1)
                values = settings.setdefault(setting_name(name), [])
            else:
                value = [word]
            values += [text if (number := as_float(text)) is None else f"{number:g}" for text in value]
        return {name: " ".join(values) for name, values in settings.items() if name not in COMPARISON_OPTIONS}

    def _words(self) -> list[str]:
        try:
            return shlex.split(str(self.value("command")))
        except ValueError:  # edited by hand
            return []

    def value(self, name: str) -> Any:
        """Return the value of a setting; its default or "-" if it is not set. An integral float becomes an int."""
        value = self.settings.get(name, self.facts.get(name, TRAINING_FACTS.get(name, "-")))
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def group_key(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the values of settings as strings."""
        return tuple(str(self.value(name)) for name in names)

    def record(self) -> dict[str, Any]:
        """Return the content of the :class:`~lsoftmax_lightning.dashboard.record.TestRecord`; empty without one."""
        if self.folder is None:
            return {}
        path = self.folder / "test.pt"
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True) if path.is_file() else {}
        except Exception as error:  # a damaged file raises many types
            rank_zero_warn(f"{path} cannot be read and is left out of the plots: {error or type(error).__name__}")
            return {}
        return content

    def row(self) -> dict[str, Any]:
        """Return the row of ``results.csv``."""
        # an empty cell means that the setting is not set
        settings = {name: repr(value) if value in (None, "") else value for name, value in self.settings.items()}
        return {"margin": self.margin, **settings, "seed": self.seed, **self.metrics, **self.facts}


def columns(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the columns of ``results.csv``: margin, settings, seed, metrics, then facts starting with ``data``."""
    settings = sorted({name for run in runs for name in run.settings})
    metrics = [name for run in runs for name in run.metrics]
    facts = sorted((name for run in runs for name in run.facts), key=lambda name: name != "data")
    return list(dict.fromkeys(["margin", *settings, "seed", *metrics, *facts]))


def setting_names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the names of the settings that distinguish runs with equal margin and seed."""
    averaged = {name for run in runs for name in run.averaged}
    swept = sorted({name for run in runs for name in run.settings} - averaged)
    facts = [name for name in TRAINING_FACTS if len({str(run.value(name)) for run in runs}) > 1]
    return [*swept, *(name for name in facts if name not in averaged)]


def column_name(setting: str) -> str:
    """Return the name of a setting in a table: ``train_size``, one of the facts, for ``data.train_size``."""
    name = setting_name(setting)
    return name.removeprefix("data.") if name in ("data.train_size", "data.label_noise") else setting


def as_float(value: Any) -> float | None:
    """Return the value of a setting as a float, None if it is not a number. YAML reads 1e-3 as a string."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def read(path: Path) -> Iterator[FinishedRun]:
    """Read finished runs, in no particular order.

    Args:
        path: Folder of a comparison, or a ``results.csv``.

    Raises:
        InputError: If the ``config.yaml`` of a run is missing or damaged, or the file is not a ``results.csv``.
    """
    if path.is_file():
        yield from _read_rows(path)
        return
    for file in path.glob("*/run.json"):
        finished, damaged = read_facts_and_metrics(file.parent)
        if finished is None:
            rank_zero_warn(f"{damaged or file} is missing or damaged; its run is left out.")
            continue
        facts, metrics = finished
        settings = dict(facts.pop("params"))
        config_facts = _facts_from_config(_config(file.with_name("config.yaml")), metrics)
        yield FinishedRun(
            margin=settings.pop("margin"),
            seed=settings.pop("seed"),
            settings={name: value for name, value in settings.items() if column_name(name) not in TRAINING_FACTS},
            metrics=metrics,
            facts={**config_facts, **facts},
            folder=file.parent,
        )


def _read_rows(path: Path) -> Iterator[FinishedRun]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = list(rows.fieldnames or ())
            margin, seed = names.index("margin"), names.index("seed")
            swept = names[margin + 1 : seed]
            measured = names[seed + 1 : names.index("data")] if "data" in names else []
            for row in rows:
                cells = {name: from_csv_safe(text) for name, text in row.items() if text}
                metrics = [name for name in cells if "/" in name or name in measured]
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
            f"--report: not a valid results.csv, got {path} ({type(error).__name__}: {error}); pass a folder or "
            "results.csv written by compare."
        ) from error


def _parsed(text: str) -> Any:
    """Return a number if Python formats it as this text, else the text; ``''`` stands for the empty text."""
    for type_ in (int, float):
        try:
            if str(type_(text)) == text:
                return type_(text)
        except ValueError:
            continue
    return "" if text == repr("") else text


def _facts_from_config(config: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the facts derived from a run's config, omitting unset ones."""
    data, model = (config[name].get("init_args", {}) for name in ("data", "model"))
    backbone, monitor = model.get("backbone"), config["checkpoint"].get("monitor")
    train_settings = {name: data[name] for name in ("train_size", "label_noise") if data.get(name)}
    facts = {
        "data": str(config["data"].get("class_path")).rpartition(".")[2],
        "backbone": backbone.get("class_path") if isinstance(backbone, Mapping) else backbone,
        "batch_size": data.get("batch_size"),
        **train_settings,
        "checkpoint": f"{config['checkpoint'].get('mode')}imum of {monitor}" if monitor in metrics else "last",
        "paper": None if train_settings else paper_experiment(config),
    }
    return {name: value for name, value in facts.items() if value is not None}


def read_facts_and_metrics(folder: Path) -> tuple[tuple[dict[str, Any], dict[str, float]] | None, Path | None]:
    """Read the facts and metrics of a finished run.

    Args:
        folder: Folder of the run.

    Returns:
        The facts, with the ``params`` of the run, and the metrics, or None if the run is not finished or a file is
        damaged; and the damaged file, or None.
    """
    run_file, results_file = folder / "run.json", folder / "results.json"
    if not run_file.exists():
        return None, None
    facts, metrics = read_json(run_file), read_json(results_file)
    if facts and "point" in facts:  # its name in earlier releases
        facts["params"] = facts.pop("point")
    params = facts.get("params") if facts else None
    if facts is None or not isinstance(params, dict) or not _are_numbers(params.get(key) for key in ("margin", "seed")):
        return None, run_file
    if metrics is None or not _are_numbers(metrics.values()):
        return None, results_file
    return (facts, metrics), None


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file; None if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: neither UTF-8 nor JSON
        return None
    return content if isinstance(content, dict) else None


def _config(path: Path) -> dict[str, Any]:
    """Return the settings of a finished run."""
    config = read_yaml(path) or {}
    for section in (config.get(name) for name in ("checkpoint", "data", "model")):
        if not isinstance(section, dict) or not isinstance(section.get("init_args", {}), dict):
            raise damaged_config(path)
    return config


def damaged_config(path: Path) -> InputError:
    """Return the error for a finished run whose ``config.yaml`` is missing or damaged."""
    return InputError(
        f"{path} is missing or damaged, but its run is finished; restore the file, or remove {path.parent} to train "
        "that run again."
    )
