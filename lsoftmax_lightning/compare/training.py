"""Trains the runs of a comparison, some at once, each in a process of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..atomic import write_text
from ..errors import InputError
from .planning import Run
from .provenance import machine_and_versions
from .results import read_json, train_settings

_PATIENCE = 60  # seconds for a run to end when it is asked to


@dataclass
class _Work:
    """A run that is being trained, in one of the places for runs at once."""

    run: Run
    place: int
    threads: int
    process: subprocess.Popen[bytes]
    task: TaskID
    resumed: bool
    began: float = field(default_factory=time.monotonic)
    steps: float = 0
    total: float = math.inf

    def look(self) -> None:
        """Reads how far it is."""
        try:
            done, total = (self.run.folder / "progress").read_text().split()
            self.steps, self.total = float(done), float(total)
        except (OSError, ValueError):  # not begun, or damaged
            return

    @property
    def share(self) -> float:
        """How much of the run is over, 0 to 1."""
        return self.steps / self.total if self.total else 0

    def finish(self, facts: Mapping[str, str]) -> None:
        """Keeps what is known of it, which also says that it is finished."""
        content = {
            "point": self.run.point,
            "steps": int(self.steps),
            "seconds": None if self.resumed else round(time.monotonic() - self.began, 1),
            "threads": self.threads,
            **facts,
            **train_settings(self.run.config),
            **machine_and_versions(),
        }
        (self.run.folder / "progress").unlink(missing_ok=True)
        write_text(self.run.folder / "run.json", json.dumps(content, indent=2) + "\n")


def train(runs: Sequence[Run], jobs: int, folder: Path, facts: Mapping[str, str]) -> dict[Run, str]:
    """Trains the runs that are not finished; an interrupted one goes on from its last checkpoint.

    Args:
        runs: All runs of the comparison.
        jobs: How many are trained at once. Where there are several, each has its share of the GPUs and, unless
            ``OMP_NUM_THREADS`` is set, of the CPU's cores.
        folder: Of the comparison, which is locked.
        facts: Facts of the comparison, such as its command, that are kept with each run.

    Returns:
        The runs that failed, each with the last line that it printed.

    Raises:
        InputError: If another process is at work in the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            return {run: _last_line(run) for run in _train(runs, jobs, facts)}
    except Timeout as error:
        raise InputError(f"another comparison is at work in {folder}: wait for it, or choose a --folder.") from error
    except FileExistsError as error:
        raise InputError(f"--folder takes a folder, and {folder} is a file.") from error


def _train(runs: Sequence[Run], jobs: int, facts: Mapping[str, str]) -> list[Run]:
    waiting = deque(run for run in runs if not run.finished)
    done = len(runs) - len(waiting)
    places = list(range(min(jobs, len(runs))))
    working: list[_Work] = []
    failed: list[Run] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, speed_estimate_period=3600) as progress:
        if done:
            progress.print(f"{done} of {len(runs)} runs are finished already.")
        whole = progress.add_task("all", total=len(runs), completed=done, unit="runs")
        try:
            while waiting or working:
                while waiting and places:
                    working.append(_start(waiting.popleft(), places.pop(0), jobs, progress))
                time.sleep(0.2)
                for work in list(working):
                    work.look()
                    progress.update(
                        work.task, completed=work.steps, total=work.total if math.isfinite(work.total) else None
                    )
                    if work.process.poll() is None:
                        continue
                    working.remove(work)
                    places.append(work.place)
                    progress.remove_task(work.task)
                    done += 1
                    # a run that was told to end has no results, and no code to say so
                    if work.process.returncode == 0 and read_json(work.run.folder / "results.json") is not None:
                        work.finish(facts)
                        said = _accuracy(work.run)
                    else:
                        failed.append(work.run)
                        said = "failed"
                    left = progress.tasks[0].time_remaining
                    about = f", {timedelta(seconds=round(left))} left" if left else ""
                    progress.print(f"{work.run.folder.name}: {said} ({done} of {len(runs)} runs{about})")
                progress.update(whole, completed=done + sum(work.share for work in working))
        finally:
            for work in working:
                work.process.terminate()
            for work in working:
                try:
                    work.process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    os.killpg(work.process.pid, signal.SIGKILL)  # with those that it started on other devices
    return failed


def _start(run: Run, place: int, jobs: int, progress: Progress) -> _Work:
    resumed = (run.folder / "checkpoints" / "last.ckpt").is_file()
    if not resumed:
        shutil.rmtree(run.folder, ignore_errors=True)  # nothing in it to go on from
    run.write_config()  # also over one that an interrupted call left incomplete
    (run.folder / "results.json").unlink(missing_ok=True)
    environment = _share(place, jobs)
    with (run.folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lsoftmax_lightning.compare.worker", str(run.folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    task = progress.add_task(run.folder.name, total=None, unit="steps")
    threads = int(environment.get("OMP_NUM_THREADS", torch.get_num_threads()))
    return _Work(run, place, threads, process, task, resumed)


def _share(place: int, jobs: int) -> dict[str, str]:
    """The environment of a run: with the GPUs and cores that are its own where there are several."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for what the settings import
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // jobs)))
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[place::jobs]) or devices[place % len(devices)]
    return environment


def _accuracy(run: Run) -> str:
    accuracy = (read_json(run.folder / "results.json") or {}).get("test/acc")
    return "finished" if accuracy is None else f"test accuracy {accuracy:.2%}"


def _last_line(run: Run) -> str:
    lines = (run.folder / "log.txt").read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
