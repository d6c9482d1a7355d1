"""Training of the runs of a comparison in parallel processes."""

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
from ..provenance import machine_and_versions
from .planning import Run
from .results import read_json

_TERMINATION_TIMEOUT = 60  # seconds between SIGTERM and SIGKILL


@dataclass
class Job:
    """A run in training.

    Attributes:
        run: The run.
        slot: Index among the parallel runs.
        threads: Number of threads of its process.
        process: Its process.
        task: Its progress bar.
        resumed: Whether it continues from a checkpoint, so that its duration is unknown.
        started: Time of the start, in seconds.
        steps: Number of optimiser steps done.
        total_steps: Number of optimiser steps of the whole run; infinite if it is unknown.
    """

    run: Run
    slot: int
    threads: int
    process: subprocess.Popen[bytes]
    task: TaskID
    resumed: bool
    started: float = field(default_factory=time.monotonic)
    steps: float = 0
    total_steps: float = math.inf

    def poll(self) -> None:
        """Read the progress from the file that the process writes."""
        try:
            steps, total_steps = map(float, (self.run.folder / "progress").read_text(encoding="utf-8").split())
        except (OSError, ValueError):  # not written yet, or damaged
            return
        self.steps, self.total_steps = steps, total_steps if total_steps > 0 else math.inf  # run_length may be -1

    @property
    def fraction(self) -> float:
        """Fraction of the steps that are done."""
        return self.steps / self.total_steps

    def finish(self, facts: Mapping[str, str]) -> None:
        """Write ``run.json``, which also marks the run as finished."""
        content = {
            "params": self.run.params,
            "steps": int(self.steps),
            "seconds": None if self.resumed else round(time.monotonic() - self.started, 1),
            "threads": self.threads,
            **facts,
            **machine_and_versions(),
        }
        (self.run.folder / "progress").unlink(missing_ok=True)
        write_text(self.run.folder / "run.json", json.dumps(content, indent=2) + "\n")


def train(runs: Sequence[Run], jobs: int, folder: Path, facts: Mapping[str, str]) -> dict[Run, str]:
    """Train the unfinished runs; an interrupted run continues from its last checkpoint.

    Args:
        runs: All runs of the comparison.
        jobs: Number of runs trained at once. They divide the GPUs and, unless ``OMP_NUM_THREADS`` is set, the CPU
            cores.
        folder: Folder of the comparison. It is locked during the training.
        facts: Facts of the comparison, such as its command, to write to the ``run.json`` of each run.

    Returns:
        The last line of the output of each failed run.

    Raises:
        InputError: If another comparison uses the folder, or its path is a file or inside a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--folder: is a file or inside a file, got {folder}; choose a folder.") from error
    try:
        with FileLock(folder / ".lock", timeout=0):
            return {run: _last_line(run) for run in _train(runs, jobs, facts)}
    except Timeout as error:
        raise InputError(f"--folder: is in use by another comparison, got {folder}; wait or choose another.") from error


def _train(runs: Sequence[Run], jobs: int, facts: Mapping[str, str]) -> list[Run]:
    """Train the unfinished runs and return the failed ones."""
    waiting = deque(run for run in runs if not run.finished)
    num_done = len(runs) - len(waiting)
    num_slots = min(jobs, len(waiting))
    free_slots = list(range(num_slots))
    running: list[Job] = []
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
        if num_done:
            progress.print(f"{num_done} of {len(runs)} runs are already finished.")
        all_runs = progress.add_task("all", total=len(runs), completed=num_done, unit="runs")
        try:
            while waiting or running:
                while waiting and free_slots:
                    running.append(_start(waiting.popleft(), free_slots.pop(0), num_slots, progress))
                time.sleep(0.2)
                for job in list(running):
                    job.poll()
                    total_steps = job.total_steps if math.isfinite(job.total_steps) else None
                    progress.update(job.task, completed=job.steps, total=total_steps)
                    if job.process.poll() is None:
                        continue
                    running.remove(job)
                    free_slots.append(job.slot)
                    progress.remove_task(job.task)
                    num_done += 1
                    # a run that ended on SIGTERM may have exit code 0, but it has no results
                    if job.process.returncode == 0 and read_json(job.run.folder / "results.json") is not None:
                        job.finish(facts)
                        status = _accuracy(job.run)
                    else:
                        failed.append(job.run)
                        status = "failed"
                    seconds = progress.tasks[progress.task_ids.index(all_runs)].time_remaining
                    remaining = f", {timedelta(seconds=round(seconds))} left" if seconds else ""
                    progress.print(f"{job.run.folder.name}: {status} ({num_done} of {len(runs)} runs{remaining})")
                progress.update(all_runs, completed=num_done + sum(job.fraction for job in running))
        finally:
            for job in running:
                job.process.terminate()
            for job in running:
                try:
                    job.process.wait(_TERMINATION_TIMEOUT)
                except subprocess.TimeoutExpired:
                    os.killpg(job.process.pid, signal.SIGKILL)  # including its processes for other devices
    return failed


def _start(run: Run, slot: int, num_slots: int, progress: Progress) -> Job:
    """Start the process of a run."""
    last = run.folder / "checkpoints" / "last.ckpt"
    resumed = last.is_file()
    if not resumed and run.folder.exists():
        progress.print(f"{last} is missing: {run.folder} is removed, and its run starts from the beginning.")
        shutil.rmtree(run.folder, ignore_errors=True)
    run.write_config()  # replaces one that an interrupted call left incomplete
    (run.folder / "results.json").unlink(missing_ok=True)
    environment = job_environment(slot, num_slots)
    threads = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # of the outermost level
    num_threads = int(threads) if threads.isdecimal() else torch.get_num_threads()
    task = progress.add_task(run.folder.name, total=None, unit="steps")
    with (run.folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lsoftmax_lightning.compare.worker", str(run.folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Job(run, slot, num_threads, process, task, resumed)


def job_environment(slot: int, num_slots: int) -> dict[str, str]:
    """Return the environment variables of a run; parallel runs divide the GPUs and CPU cores."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for classes that the settings import
    if num_slots > 1:
        if not environment.get("OMP_NUM_THREADS"):
            environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // num_slots))
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[slot::num_slots]) or devices[slot % len(devices)]
    return environment


def _accuracy(run: Run) -> str:
    accuracy = (read_json(run.folder / "results.json") or {}).get("test/acc")
    return "finished" if accuracy is None else f"test accuracy {accuracy:.2%}"


def _last_line(run: Run) -> str:
    lines = (run.folder / "log.txt").read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
