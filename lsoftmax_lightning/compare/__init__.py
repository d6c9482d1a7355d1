"""Comparison of margins over seeds: training, table and figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config_files import setting_name
from ..errors import InputError, RunError
from .planning import plan
from .reporting import report
from .text import format_argument
from .training import train

__all__ = ["compare_margins", "report"]


def compare_margins(
    config: str | Path | Sequence[str | Path],
    margins: Sequence[int] = (1, 2, 3, 4),
    seeds: Sequence[int] = (0, 1, 2),
    settings: Sequence[str] = (),
    sweep: Mapping[str, Sequence[Any]] | None = None,
    jobs: int = 1,
    folder: str | Path | None = None,
    average: Mapping[str, Sequence[Any]] | None = None,
    html: bool = False,
) -> list[dict[str, Any]]:
    """Train a config with several margins and seeds, and write table, figures and all runs to one folder.

    Repeat the call to continue an interrupted comparison: it skips finished runs and resumes interrupted ones from
    their last checkpoint. With more margins, seeds or values it trains only the new runs.

    Args:
        config: Path of a YAML file or name of a shipped config, or a list of these; later ones override earlier ones.
        margins: Margins m to compare. The table has differences to m = 1 if it is one of them.
        seeds: Seeds of the training, the same for every margin.
        settings: Further arguments of ``fit``, the same for all runs: ``["--trainer.max_steps", "600"]``.
        sweep: Values of further settings by name, crossed with the margins:
            ``{"model.label_smoothing": [0, 0.1]}``.
        jobs: Number of runs trained at once. They divide the GPUs and CPU cores.
        folder: Folder of the comparison. Default: ``runs/compare-<config>``.
        average: Like ``sweep``, but the table averages over these values and pairs runs by them as by the seed:
            ``{"data.fold": [1, 2, 3]}``.
        html: Whether to also write table and figures as one page, ``report.html``.

    Returns:
        A row for each run in the folder, as in its ``results.csv``: margin, seed, swept settings, test metrics, the
        validation metric that chose the checkpoint, steps, seconds, machine and versions.

    Raises:
        InputError: Before any training, if a setting is not available, or the folder contains other runs or is in use.
        DataError: Before any training, if data cannot be downloaded.
        RunError: If a run failed. It is raised after the other runs, and table and figures of these are written.
    """
    configs = [str(name) for name in ([config] if isinstance(config, str | Path) else config)]
    names = [setting_name(key) for key in [*(sweep or {}), *(average or {})]]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--sweep and --average: have a duplicate setting, got {name} twice; list all its values.")
    sweep, average = (
        {setting_name(key): values for key, values in (values_by_key or {}).items()}
        for values_by_key in (sweep, average)
    )
    if jobs < 1:
        raise InputError(f"jobs: must be at least 1, got {jobs}; set the number of runs to train at once.")
    path = Path(folder or Path("runs", f"compare-{Path(configs[-1]).stem}")).absolute()
    command = ["python", "-m", "lsoftmax_lightning", "compare"]
    for name in configs:
        command += ["--config", name]
    command += ["--margins", *map(str, margins), "--seeds", *map(str, seeds)]
    for option, values_by_key in (("--sweep", sweep), ("--average", average)):
        for key, values in values_by_key.items():
            command += [option, f"{key}={','.join(map(format_argument, values))}"]
    command += ["--jobs", str(jobs)] if jobs > 1 else []
    command += ["--folder", str(folder)] if folder else []
    command += ["--html"] if html else []
    runs = plan(configs, margins, seeds, settings, {**sweep, **average}, path)
    facts = {"command": shlex.join([*command, *settings])}
    if average:
        facts["averaged"] = ", ".join(average)
    failed = train(runs, jobs, path, facts)
    rows = report(path, average=average, html=html) if any(run.finished for run in runs) else []
    if failed:
        reasons = "".join(f"\n  {run.folder.name}: {reason}" for run, reason in failed.items())
        raise RunError(
            f"{len(failed)} of {len(runs)} runs failed; the same command tries them again.{reasons}\n"
            f"Their output is in {path}/<run>/log.txt."
        )
    return rows
