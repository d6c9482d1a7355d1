"""Margins and seeds against each other: trains them, and makes table and figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from .planning import plan
from .reporting import report
from .text import format_argument
from .training import train

__all__ = ["compare", "report"]


def compare(
    config: str | Sequence[str],
    margins: Sequence[int] = (1, 2, 3, 4),
    seeds: Sequence[int] = (0, 1, 2),
    settings: Sequence[str] = (),
    sweep: Mapping[str, Sequence[Any]] | None = None,
    jobs: int = 1,
    folder: str | Path | None = None,
    average: Mapping[str, Sequence[Any]] | None = None,
) -> list[dict[str, Any]]:
    """Trains a config at several margins and seeds and leaves table, figures and all runs in one folder.

    A call that was interrupted goes on when it is made again: runs that are finished are skipped, one that was
    interrupted continues from its last checkpoint. With more margins, seeds or values only the new ones are trained.

    Args:
        config: Path of a YAML, or the name of a shipped one; or several, later ones over earlier ones.
        margins: The m to compare; differences are to m = 1, if it is among them.
        seeds: Of the trainings; the same for every margin.
        settings: Further arguments of ``fit``, the same for all runs: ``["--trainer.max_steps", "600"]``.
        sweep: Further settings by their names, and values of each, to be crossed with the margins:
            ``{"model.label_smoothing": [0, 0.1]}``.
        jobs: How many runs are trained at once, each on its share of the GPUs or of the CPU's cores.
        folder: Where all is left, by default ``runs/compare-<config>``.
        average: Like ``sweep``, but the table has means over these values, and pairs runs by them as by the seed:
            ``{"data.fold": [1, 2, 3]}``.

    Returns:
        A row for each run in the folder, as in its ``results.csv``: margin, seed and swept settings, test figures, the
        validation figure that chose the checkpoint, steps, seconds, and what it was run on.

    Raises:
        InputError: Before any training, if a setting is not to be had, or the folder is of other runs or in use.
        DataError: Before any training, if data cannot be downloaded.
        RunError: If a training failed; after all others, and with table and figures made of these.
    """
    configs = [config] if isinstance(config, str) else list(config)
    sweep, average = sweep or {}, average or {}
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}.")
    path = Path(folder or Path("runs", f"compare-{Path(configs[-1]).stem}")).absolute()
    words = ["python", "-m", "lsoftmax_lightning", "compare"]
    for name in configs:
        words += ["--config", name]
    words += ["--margins", *map(str, margins), "--seeds", *map(str, seeds)]
    for option, crossed in (("--sweep", sweep), ("--average", average)):
        for key, values in crossed.items():
            words += [option, f"{key}={','.join(map(format_argument, values))}"]
    words += ["--jobs", str(jobs)] if jobs > 1 else []
    words += ["--folder", str(folder)] if folder else []
    if both := sweep.keys() & average.keys():
        raise InputError(f"--average: must be settings that --sweep does not have, got {', '.join(both)} in both.")
    runs = plan(configs, margins, seeds, settings, {**sweep, **average}, path)
    facts = {"command": shlex.join([*words, *settings])}
    if average:
        facts["averaged"] = ", ".join(average)
    failed = train(runs, jobs, path, facts)
    rows = report(path, average=average) if any(run.finished for run in runs) else []
    if failed:
        reasons = "".join(f"\n  {run.folder.name}: {reason}" for run, reason in failed.items())
        raise RunError(
            f"{len(failed)} of {len(runs)} runs failed; the same command tries them again.{reasons}\n"
            f"All that they printed is in {path}/<run>/log.txt."
        )
    return rows
