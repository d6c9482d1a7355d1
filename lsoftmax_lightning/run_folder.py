"""Folder of a run: the checkpoint to resume from, the lock, and the results."""

from __future__ import annotations

import glob
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning import Trainer
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .atomic import disk_errors, write_text
from .checkpoints import indexed, read
from .config_files import flat, read_yaml
from .errors import InputError
from .library_messages import USED_LOG_WARNING
from .settings import is_kind

LOCK_SECONDS = 10  # workers of a killed run keep its lock for a few seconds


class RunFolders:
    """Run folders of a TensorBoardLogger, for ``--ckpt_path last`` and ``--ckpt_path best``.

    Args:
        loggers: Settings of the loggers.
        word: ``last`` or ``best``.
        best_folder: Folder of the best checkpoint. None means that in the config of the run.

    Attributes:
        index: Index of the TensorBoardLogger among the loggers.
        logger: Settings of the TensorBoardLogger.

    Raises:
        InputError: If there is no TensorBoardLogger, or its folders are remote.
    """

    def __init__(self, loggers: list[Any], word: str, best_folder: str | None) -> None:
        index = next((n for n, logger in enumerate(loggers) if is_kind(logger, TensorBoardLogger)), None)
        if index is None:
            raise InputError(f"--ckpt_path {word}: needs a TensorBoardLogger, got none; give a file instead.")
        self.index = index
        self.logger = loggers[index].init_args
        if "://" in self.logger.save_dir:
            raise InputError(
                f"--ckpt_path {word}: needs a local save_dir, got {self.logger.save_dir}; give the URL of a file."
            )
        self._word = word
        self._best_folder = best_folder

    def find(self, settings: Mapping[str, Any] | None = None) -> Path:
        """Return the folder of the last run that has a checkpoint; the folder may be missing.

        If the logger has a version, it is the folder of this version.

        Args:
            settings: Settings of the command that resumes the run, by name. If given, a run with the same settings that
                ended before its first checkpoint is found as well.
        """
        runs = Path(self.logger.save_dir, self.logger.name or "")
        version = self.logger.version
        if version is not None:
            return runs / (version if isinstance(version, str) else f"version_{version}")
        started = {}
        for folder in runs.glob("*/"):
            config = self.config(folder)  # test and predict do not write a config
            if config.is_file():
                started[folder] = (config.stat().st_mtime, str(_version(folder)).rjust(9))
        latest = sorted(started, key=lambda folder: started[folder], reverse=True)
        for folder in latest:
            if self.checkpoint(folder).is_file():
                return folder
            if settings is not None and not _changed_settings(self.config(folder), settings):
                return folder
        return latest[0] if latest else runs / "*"

    def config(self, folder: Path) -> Path:
        """Return the path of the config of a run."""
        return Path(folder, self.logger.sub_dir or "", "config.yaml")

    def checkpoint(self, folder: Path) -> Path:
        """Return the path of the checkpoint of a run; the file may be missing."""
        config = read_yaml(self.config(folder)) or {}
        best_folder = self._best_folder or flat(config).get("checkpoint.dirpath")
        return indexed(best_folder if self._word == "best" and best_folder else folder / "checkpoints", self._word)

    def resumed_logger(self, folder: Path, global_step: int) -> dict[str, Any]:
        """Return the settings of a logger that continues a run.

        Args:
            folder: Folder of the run.
            global_step: Step of the checkpoint. TensorBoard hides values that were logged after it.
        """
        version = _version(folder) if self.logger.version is None else self.logger.version
        settings: dict[str, Any] = self.logger.as_dict()
        return settings | {"version": version, "purge_step": global_step + 1}


def training_logger(settings: Namespace, margin: int | None, seed: int | bool | None) -> dict[str, Any]:
    """Return the settings of a TensorBoardLogger without a version, for a run named after its margin and seed.

    Args:
        settings: Its settings.
        margin: Margin m; None if the module has no head.
        seed: Seed of the run; a bool or None if it has none of its own.

    Returns:
        The settings with a version such as ``m4-s0``, or ``m4-s0-2`` for the second such run.
    """
    arguments: dict[str, Any] = settings.as_dict()
    parts = [] if margin is None else [f"m{margin}"]
    if seed is not None and not isinstance(seed, bool):
        parts.append(f"s{seed}")
    if not parts:
        return arguments
    runs = os.path.join(settings.save_dir, settings.name or "")
    exists = get_filesystem(runs).exists
    free = (name for name in _numbered("-".join(parts)) if not exists(os.path.join(runs, name)))
    return arguments | {"version": next(free)}


def _numbered(name: str) -> Iterator[str]:
    """Yield ``name``, ``name-2``, ``name-3`` and so on."""
    yield name
    yield from (f"{name}-{count}" for count in itertools.count(2))


def evaluation_logger(settings: Namespace, command: str, ckpt_path: str | None) -> dict[str, Any]:
    """Return the settings of a TensorBoardLogger for a command that evaluates a checkpoint.

    Args:
        settings: Settings of the logger, without a version.
        command: Name of the command, and of the folder that it writes to.
        ckpt_path: The checkpoint. If it is in the folder of a run, the command writes to a folder in that folder;
            otherwise, to a folder among the runs, such as ``test``, or ``test-2`` if a run has this name.
    """
    arguments: dict[str, Any] = settings.as_dict()
    run = run_of(ckpt_path, settings.sub_dir)
    if run is None:
        runs = os.path.join(settings.save_dir, settings.name or "")
        free = (name for name in _numbered(command) if not is_run_folder(os.path.join(runs, name)))
        return arguments | {"version": next(free)}
    sub_dir = os.path.join(settings.sub_dir or "", command)
    return arguments | {"save_dir": str(run.parent), "name": "", "version": run.name, "sub_dir": sub_dir}


def run_of(ckpt_path: str | None, sub_dir: str | None = None) -> Path | None:
    """Return the folder of the run that wrote a checkpoint; None if the checkpoint is not in the folder of a run.

    Args:
        ckpt_path: The checkpoint.
        sub_dir: Folder of the config in that of the run.
    """
    if not ckpt_path:
        return None
    run = Path(os.path.relpath(Path(ckpt_path).absolute().parent.parent))
    return run if any((run / folder / "config.yaml").is_file() for folder in ("", sub_dir or "")) else None


def is_run_folder(log_dir: str) -> bool:
    """Return whether ``fit`` wrote to the folder of a logger; other commands do not write these files there."""
    exists = get_filesystem(log_dir).exists
    return any(exists(os.path.join(log_dir, name)) for name in ("config.yaml", "metrics.csv"))


def _version(folder: Path) -> int | str:
    """Return the version of a run as a logger accepts it."""
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() and folder.name == f"version_{int(number)}" else folder.name


def _changed_settings(config: Path, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]] | None:
    """Return the settings that differ from a run's config, as (before, now); None if the config is damaged."""
    content = read_yaml(config)
    if content is None or "ckpt_path" not in content:  # earlier releases did not write it atomically
        return None
    before = flat(content)
    pairs = {name: (before.get(name), settings.get(name)) for name in sorted({**before, **settings})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name != "ckpt_path"}


def report_changed_settings(config: Path, settings: Mapping[str, Any], continues: bool) -> None:
    """Log the settings that differ from those of the run to resume.

    Args:
        config: Path of the run's config.
        settings: Settings of this command, by name.
        continues: Whether the run continues in its folder, so that the margin cannot change.

    Raises:
        InputError: If the margin of such a run, or the class of the optimizer or lr_scheduler differs.
    """
    changed = _changed_settings(config, settings)
    if changed is None:
        rank_zero_warn(f"{config} is not complete, so changed settings are not reported.")
        return
    fixed = ["model.optimizer.class_path", "model.lr_scheduler.class_path"]
    for name in ["model.margin", *fixed] if continues else fixed:
        before, now = changed.get(name, (None, None))
        if before != now:
            raise InputError(
                f"{name.removesuffix('.class_path')}: must be {before} to resume the run in {config.parent}, got "
                f"{now}; set it back, or start a new run without --ckpt_path."
            )
    lines = "".join(f"\n  {name} {before} -> {now}" for name, (before, now) in changed.items())
    rank_zero_info(f"Resuming {config.parent}" + (f" with changed settings:{lines}" if changed else ""))
    kept = ("model.optimizer.", "model.lr_scheduler.")
    if any(name.startswith(kept) for name in changed.keys() - {"model.lr_scheduler.monitor"}):
        rank_zero_warn(
            "The checkpoint determines the settings of optimizer and lr_scheduler; changes of them have no effect."
        )


@contextmanager
def locked_checkpoints(folders: Iterable[str], ckpt_path: str | None) -> Iterator[None]:
    """Lock folders of checkpoints that are outside the folder of a run during the block.

    Args:
        folders: Folders or URLs. URLs are checked, but not locked.
        ckpt_path: Checkpoint to resume from, if any.

    Raises:
        InputError: If a folder contains checkpoints of another run, or a run of another process uses it.
        RunError: If a folder cannot be written.
    """
    others = [folder for folder in dict.fromkeys(folders) if not _keeps_checkpoints_in(folder, ckpt_path)]

    def check() -> None:
        for folder in others:
            if found := get_filesystem(folder).glob(f"{glob.escape(folder)}/*.ckpt"):
                raise InputError(
                    f"{folder} contains another run, got {PurePath(found[0]).name}; choose another "
                    "trainer.default_root_dir or checkpoint.dirpath, or resume it with --ckpt_path."
                )

    with ExitStack() as locks:
        check()
        for folder in {Path(folder).resolve() for folder in folders if "://" not in folder}:
            locks.enter_context(_lock(folder, "checkpoint.dirpath"))
        check()  # a run of another process may have ended in the meantime
        yield


def _keeps_checkpoints_in(path: str, ckpt_path: str | None) -> bool:
    """Return whether the run of a checkpoint keeps checkpoints in a folder, also if both were moved."""
    if not ckpt_path or not Path(ckpt_path).is_file():
        return False
    folder = Path(path).resolve()
    if folder == Path(ckpt_path).resolve().parent:
        return True
    states = read(ckpt_path).get("callbacks", {}).values()
    folders = [Path(state["dirpath"]) for state in states if isinstance(state, dict) and state.get("dirpath")]
    moved = {path.name for path in folders} - {"checkpoints"}  # each run has a folder of this name
    return folder in folders or folder.name in moved


def _lock(folder: Path, setting: str) -> AbstractContextManager[Any]:
    """Create and lock a folder.

    Raises:
        InputError: If a run of another process uses it.
        RunError: If it cannot be written.
    """
    with disk_errors(setting, folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(folder / ".lock").acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise InputError(
                f"{setting}: must not be that of a run in another process, got {folder}; wait for its end, or choose "
                "another."
            ) from error


@contextmanager
def locked_run(folder: Path, log_dir: str, ckpt_path: str | None) -> Iterator[None]:
    """Lock the folder of a run during the block, and remove incomplete files of a killed run.

    A new folder is removed after an error before the training, when it has no config.

    Args:
        folder: Folder of the run.
        log_dir: Folder of the event files.
        ckpt_path: Checkpoint to resume from, if any.

    Raises:
        InputError: If the folder contains another run, or a run of another process uses it.
        RunError: If the folder cannot be written.
    """
    resumes = ckpt_path and Path(ckpt_path).resolve().is_relative_to(folder.resolve())

    def check() -> None:
        used = [*folder.glob("checkpoints/*.ckpt"), *Path(log_dir).glob("results.json")]
        if used and not resumes:
            raise InputError(
                f"{used[0].parent} contains another run; resume it with --ckpt_path last, or choose another "
                "trainer.logger.version."
            )

    check()
    is_new = not folder.exists()
    with _lock(folder, "trainer.logger.version"):
        check()  # a run of another process may have ended in the meantime
        if is_new:
            warnings.filterwarnings("ignore", USED_LOG_WARNING)  # the folder contains the lock
        _remove_parts(folder)
        Path(log_dir, "hparams.yaml").unlink(missing_ok=True)  # it may be incomplete, and is written again
        try:
            yield
        except Exception:
            if is_new and not Path(log_dir, "config.yaml").is_file():
                shutil.rmtree(folder)
            raise


def remove_leftovers(folder: Path) -> None:
    """Remove incomplete files of killed runs from a folder, unless a running process uses it."""
    if folder.is_dir():
        with suppress(Timeout), FileLock(folder / ".lock", timeout=0):
            _remove_parts(folder)


def _remove_parts(folder: Path) -> None:
    for part in folder.rglob(".*.part"):
        if not {"validate", "test", "predict"} & set(part.relative_to(folder).parts):  # these commands hold no lock
            part.unlink(missing_ok=True)


def write_results(trainer: Trainer, chosen_by: Mapping[str, Any]) -> Path | None:
    """Write the metrics of a test to ``results.json`` in the folder of the run. Call it on all ranks.

    Args:
        trainer: The Trainer, after its test.
        chosen_by: Name and value of the validation metric that selected the tested checkpoint; empty if none did.

    Returns:
        The folder; None without a logger, or in a ``fast_dev_run``.
    """
    if trainer.fast_dev_run or not trainer.loggers:  # type: ignore[attr-defined]
        return None
    folder = Path(str(trainer.log_dir))  # a collective: every rank must read it
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.is_global_zero:
        results = {name: float(value) for name, value in {**trainer.callback_metrics, **chosen_by}.items()}
        write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return folder
