"""Checks after a kill: files are complete, and results equal those of an uninterrupted run."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

_TEMPORARY = re.compile(r".*\.part$|.*\.part\..*|tmp.*|.*\.(rows|embeddings)\.\d+$|progress$")
_LOGS = re.compile(r".*events\.out|dashboard/|log\.txt|projector_config\.pbtxt|\d+/val/")
_RESUMED = ("global_step", "state_dict", "optimizer_states", "lr_schedulers")
_VARYING = ("seconds", "threads", "command")  # columns of a comparison


def temporary_files(folder: Path) -> list[str]:
    """Return the files and folders that have names of temporary ones."""
    names = [path.relative_to(folder) for path in folder.rglob("*")]
    return sorted(str(name) for name in names if _TEMPORARY.match(name.name))


def incomplete_files(folder: Path, rows: int) -> list[str]:
    """Return the unreadable files with final names, with the reason.

    Args:
        folder: Working directory of a command.
        rows: Number of images that a file of predictions must have.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        check = next((check for pattern, check in _CHECKS.items() if path.match(pattern)), None)
        if check is None or path.is_dir() or any(_TEMPORARY.match(part) for part in name.parts):
            continue
        try:
            check(path, rows)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            found.append(f"{name} ({path.stat().st_size} bytes): {reason}")
    return found


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_checkpoint(path: Path, rows: int) -> None:
    with zipfile.ZipFile(path) as archive:
        _expect(archive.testzip() is None, "damaged zip")
    _expect(bool(torch.load(path, weights_only=True)), "empty")


def _check_program(path: Path, rows: int) -> None:
    with zipfile.ZipFile(path) as archive:
        _expect(archive.testzip() is None, "damaged zip")
    torch.export.load(path)


def _check_yaml(path: Path, rows: int) -> None:
    _expect(isinstance(yaml.full_load(path.read_text()), dict), "no mapping")


def _check_json(path: Path, rows: int) -> None:
    _expect(bool(json.loads(path.read_text())), "empty")


def _check_csv(path: Path, rows: int) -> None:
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    _expect(bool(lines) and all(len(line) == len(header) for line in lines), "a row is missing or incomplete")
    _expect(path.read_bytes().endswith(b"\n"), "no end of line")
    if path.name.startswith("predictions"):
        _expect(len(lines) == rows, f"{len(lines)} rows")


def _check_parquet(path: Path, rows: int) -> None:
    from pyarrow.parquet import read_table

    _expect(read_table(path).num_rows == rows, "wrong number of rows")


def _check_array(path: Path, rows: int) -> None:
    _expect(len(np.load(path)) == rows, "wrong number of rows")


def _check_image(path: Path, rows: int) -> None:
    with Image.open(path) as image:
        image.load()


def _check_text(path: Path, rows: int) -> None:
    _expect(path.read_text().endswith("\n"), "no end of line")


_CHECKS: dict[str, Callable[[Path, int], None]] = {
    "*.ckpt": _check_checkpoint,
    "*.pt": _check_checkpoint,
    "*.pt2": _check_program,
    "*.yaml": _check_yaml,
    "*.json": _check_json,
    "*.csv": _check_csv,
    "*.parquet": _check_parquet,
    "*.npy": _check_array,
    "*.png": _check_image,
    "*.md": _check_text,
}


def _values(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts and lists with their names."""
    if isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from _values(value, f"{name}.{key}")
    else:
        yield name, content


def _different_values(one: Any, other: Any) -> list[str]:
    """Return the names of values that are not identical to the bit."""
    first, second = dict(_values(one)), dict(_values(other))
    return [name for name in {**first, **second} if not _same(first.get(name), second.get(name))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        kinds = [(tensor.shape, tensor.dtype) for tensor in (one, other)]
        return kinds[0] == kinds[1] and one.detach().numpy().tobytes() == other.detach().numpy().tobytes()
    return type(one) is type(other) and repr(one) == repr(other)


def last_run(folder: Path) -> Path:
    """Return the folder of the last run of fit."""
    configs = folder.glob("runs/*/*/config.yaml")
    return max(configs, key=lambda path: path.stat().st_mtime_ns).parent


def _files(run: Path) -> set[str]:
    """Return the files of a run without logs and plots, which differ in a resumed run."""
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in names if not _LOGS.match(name)}


def different_runs(expected: Path, run: Path) -> list[str]:
    """Return the differences between two runs of fit: checkpoints, results and names of files."""
    names, found_names = _files(expected), _files(run)
    found = [f"missing {name}" for name in sorted(names - found_names)]
    found += [f"extra {name}" for name in sorted(found_names - names)]
    if "results.json" in names & found_names:
        one, other = (json.loads((folder / "results.json").read_text()) for folder in (expected, run))
        found += [f"results.json{name}" for name in _different_values(one, other)]
    for name in sorted(names & found_names):
        if name.endswith(".ckpt"):
            one, other = (torch.load(folder / name, weights_only=True) for folder in (expected, run))
            parts = [{part: checkpoint[part] for part in _RESUMED} for checkpoint in (one, other)]
            differing = _different_values(*parts)
            found += [f"{name}{value}" for value in differing[:3]]
            if len(differing) > 3:
                found.append(f"{name}: {len(differing)} values")
    return found


def different_fit(expected: Path, folder: Path) -> list[str]:
    """Compare the last runs of fit in two working directories."""
    return different_runs(last_run(expected), last_run(folder))


def different_test(expected: Path, folder: Path) -> list[str]:
    """Compare the latest ``results.json`` of tests."""
    results = []
    for place in (expected, folder):
        paths = list(place.glob("runs/*/*/test/results.json"))
        if not paths:
            return [f"no results.json in {place}"]
        results.append(json.loads(max(paths, key=lambda path: path.stat().st_mtime).read_text()))
    return [f"results.json{name}" for name in _different_values(*results)]


def different_table(expected: Path, folder: Path) -> list[str]:
    """Compare the printed tables of the last validation."""
    tables = []
    for place in (expected, folder):
        text = max(place.parent.glob("*.0.out"), key=lambda path: path.stat().st_mtime).read_text()
        tables.append(re.findall(r"^ {2,}(\S.*?) {2,}(\S.*?) *$", text, re.MULTILINE))
    return [] if tables[0] == tables[1] and tables[0] else [f"metrics {tables[1]}, expected {tables[0]}"]


def different_outputs(expected: Path, folder: Path) -> list[str]:
    """Compare the files in two working directories by bytes or tensors."""
    one, other = ({path.name: path for path in place.iterdir() if path.is_file()} for place in (expected, folder))
    found = [f"missing or extra {name}" for name in sorted(one.keys() ^ other.keys())]
    for name in sorted(one.keys() & other.keys()):
        if name.endswith(".pt"):
            found += _different_values(*(torch.load(path[name], weights_only=True) for path in (one, other)))
        elif name.endswith(".pt2"):
            found += _different_values(*(dict(torch.export.load(path[name]).state_dict) for path in (one, other)))
        elif one[name].read_bytes() != other[name].read_bytes():
            found.append(f"{name} differs")
    return found


def different_comparison(expected: Path, folder: Path) -> list[str]:
    """Compare two folders of a comparison."""
    one, other = (place / "compared" for place in (expected, folder))
    names, found_names = ({path.name for path in place.iterdir()} for place in (one, other))
    found = [f"missing or extra {name}" for name in sorted(names ^ found_names)]
    for run in (path for path in one.iterdir() if path.is_dir() and (other / path.name).is_dir()):
        found += [f"{run.name}: {difference}" for difference in different_runs(run, other / run.name)]
    if "results.csv" in names & found_names:
        tables = []
        for place in (one, other):
            with (place / "results.csv").open(newline="") as file:
                rows = [{name: row[name] for name in row if name not in _VARYING} for row in csv.DictReader(file)]
            tables.append(rows)
        found += [f"results.csv{name}" for name in _different_values(*tables)]
    return found


def tracebacks(folder: Path, log: str) -> list[str]:
    """Return the last lines of tracebacks that the processes of a command printed.

    Args:
        folder: Working directory of the command.
        log: Name of its output.
    """
    found = []
    for path in [*folder.parent.glob(f"{log}.*.err"), *folder.parent.glob(f"{log}.*.out")]:
        text = path.read_text(errors="replace")
        if "Traceback (most recent call last)" in text:
            lines = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Interrupt|Exception|Exit)\b", line)]
            found.append(f"{path.name}: {lines[-1][:300] if lines else 'see there'}")
    return found
