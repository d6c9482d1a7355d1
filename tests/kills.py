"""Kill commands of the package at many moments, run them again, and compare with uninterrupted runs.

    python tests/kills.py [--kills N] [--seed S] [--only SETTING ...] [--jobs N]

It prints the table of docs/reliability.md and the failures; the exit code is 1 if there are failures. Each command runs
in a fork, so that torch is imported only once. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
warnings.simplefilter("ignore")

import kills_judge as judge  # noqa: E402
from kills_process import PATIENCE, Kill, Outcome, adopt_orphans, ending, in_fork, run, still_alive  # noqa: E402
from kills_settings import IMAGES, SCENARIOS, SETTINGS, Scenario, Setting  # noqa: E402

_SLACK = 0.03  # seconds within which the order of a signal and a file's time, or a start, is unknown
_CLOCK = 0.005  # seconds by which a file's time may lag
_CATEGORIES = ("wrong exit", "traceback", "incomplete file", "second run fails", "differs", "files left")


@dataclass
class Failure:
    """A violated guarantee."""

    category: str
    detail: str


@dataclass
class Trial:
    """A kill and its outcome."""

    scenario: str
    kill: Kill
    folder: Path
    verdict: str = "killed"  # or "too late", "not reached"
    failures: list[Failure] = field(default_factory=list)

    def fail(self, category: str, *details: str) -> None:
        """Record a failure if there are details."""
        if details:
            more = f" (and {len(details) - 5} more)" if len(details) > 5 else ""
            self.failures.append(Failure(category, "; ".join(details[:5]) + more))


@dataclass
class Row:
    """Results of a setting."""

    setting: Setting
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def killed(self) -> list[Trial]:
        """Return the trials whose signal came in time."""
        return [trial for trial in self.trials if trial.verdict == "killed"]

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        killed = self.killed()
        signals = Counter(trial.kill.number for trial in killed)
        failures = Counter(category for trial in killed for category in {f.category for f in trial.failures})
        counts = [len(killed), *(signals[number] for number in (SIGKILL, SIGTERM, SIGINT))]
        counts += [failures[category] for category in _CATEGORIES]
        return [self.setting.title, *map(str, counts)]


class References:
    """Uninterrupted runs of scenarios, created on demand."""

    def __init__(self, folder: Path, notes: list[str]) -> None:
        self.folder, self.notes = folder, notes
        self.times: dict[str, dict[str, float]] = {}

    def state(self, scenario: Scenario, commands: int) -> Path:
        """Return the working directory after some of the commands."""
        if scenario.name not in self.times:
            self._make(scenario)
        return self.folder / scenario.name / str(commands) / "work"

    def _make(self, scenario: Scenario) -> None:
        place = self.folder / scenario.name / "run"
        work = place / "work"
        if scenario.start:
            shutil.copytree(self.state(SCENARIOS[scenario.start], 1), work)
        work.mkdir(parents=True, exist_ok=True)
        if scenario.prepare:
            scenario.prepare(work)
        shutil.copytree(place, place.with_name("0"))
        for index, args in enumerate(scenario.commands):
            outcome = run(args, work, f"command{index}", scenario.ranks)
            if any(outcome.codes):
                raise RuntimeError(f"the reference {scenario.name!r} ends with {outcome.codes}, see {place}")
            shutil.copytree(place, place.with_name(str(index + 1)))
            if index == scenario.killed:
                self.times[scenario.name] = outcome.timeline | {"end": outcome.ended - outcome.started}
        wrong = [*judge.temporary_files(work), *in_fork(lambda: judge.incomplete_files(work, IMAGES))]
        if scenario.expected is not None:
            expected = place.with_name(str(scenario.expected)) / "work"
            wrong += differences(scenario, expected, work)
        if wrong:
            self.notes.append(f"reference {scenario.name!r}, uninterrupted: {'; '.join(wrong)}")


def allowed_codes(kill: Kill, rank: int, started: bool) -> tuple[int, ...]:
    """Return the exit codes that a process may end with.

    Args:
        kill: The signal.
        rank: Rank of the process.
        started: Whether the signal came after the first line of the program.
    """
    number = kill.number
    code = -SIGKILL if number == SIGKILL else 128 + number
    if not started:
        return (code, -number)
    hit = {"process": rank == 0, "rank 1": rank == 1, "worker": False}.get(kill.target, True)
    if number == SIGKILL or kill.target == "worker":
        return (code,) if hit else (1,)  # another process was killed: an error
    if hit:
        return (code, 0) if rank else (code,)  # in training the first process reports for all
    # the other ranks stop, too: together in training, otherwise with an error about a lost process
    together = (128 + SIGINT, 128 + SIGTERM) if rank == 0 else (code, 0)
    return together if kill.moment.stage in ("train", "validate") else (*together, 1)


def judge_end(trial: Trial, outcome: Outcome) -> None:
    """Judge exit codes and tracebacks of the killed command."""
    struck = outcome.struck or 0.0
    started = struck > outcome.began + _SLACK or outcome.synchronous
    for rank, code in enumerate(outcome.codes):
        allowed = allowed_codes(trial.kill, rank, started)
        if code not in allowed:
            found = f"still runs after {PATIENCE:.0f} s" if code is None else f"exit code {code}"
            after = f", {outcome.ended - struck:.2f} s after the signal"
            trial.fail("wrong exit", f"rank {rank}: {found}, expected {allowed}{after}")
    if trial.kill.number != SIGKILL and started:
        trial.fail("traceback", *judge.tracebacks(trial.folder / "work", "killed"))


def differences(scenario: Scenario, expected: Path, work: Path) -> list[str]:
    """Compare two working directories of a scenario."""
    try:
        found: list[str] = in_fork(lambda: scenario.differences(expected, work))
    except RuntimeError as error:  # of a file that is missing or cannot be read
        found = [f"cannot be compared: {str(error).strip().splitlines()[-1]}"]
    return found


def is_too_late(trial: Trial, scenario: Scenario, outcome: Outcome, expected: Path) -> bool:
    """Return whether the command had finished its work before the signal."""
    work = trial.folder / "work"
    times = [path.stat().st_mtime for pattern in scenario.result for path in trial.folder.glob(pattern)]
    complete = max((moment for moment in times if moment >= outcome.started), default=None)
    slack = -_CLOCK if outcome.synchronous and trial.kill.number != SIGKILL else _SLACK
    if complete is None or (outcome.struck or 0.0) < complete - slack:
        return False
    return not differences(scenario, expected, work)


def run_again(trial: Trial, scenario: Scenario, expected: Path) -> None:
    """Run the killed command again, and those after it; judge the results."""
    work = trial.folder / "work"
    commands = [(*scenario.commands[scenario.killed], *scenario.again), *scenario.commands[scenario.killed + 1 :]]
    for index, args in enumerate(commands):
        outcome = run(args, work, f"again{index}", scenario.ranks)
        if any(outcome.codes):
            last = [line for path in trial.folder.glob(f"again{index}.*.err") for line in path.read_text().splitlines()]
            reason = next((line for line in reversed(last) if line.strip()), "no output")
            trial.fail("second run fails", f"exit code {outcome.codes}: {reason[:300]}")
            return
    trial.fail("differs", *differences(scenario, expected, work))
    known = " ".join(failure.detail for failure in trial.failures)
    incomplete = [found for found in in_fork(lambda: judge.incomplete_files(work, IMAGES)) if found not in known]
    trial.fail("incomplete file", *(f"after the second run {found}" for found in incomplete))
    trial.fail("files left", *judge.temporary_files(work))


def try_kill(trial: Trial, scenario: Scenario, references: References) -> None:
    """Kill a command, run it again and judge everything."""
    work = trial.folder / "work"
    shutil.copytree(references.state(scenario, scenario.killed), work)
    needed = len(scenario.commands) if scenario.expected is None else scenario.expected
    expected = references.state(scenario, needed)
    outcome = run(scenario.commands[scenario.killed], work, "killed", scenario.ranks, trial.kill)
    with ending(outcome.survivors):
        if outcome.struck is None:
            trial.verdict = "not reached"
            return
        # results of the killed command, not of later ones
        if is_too_late(trial, scenario, outcome, references.state(scenario, scenario.killed + 1)):
            trial.verdict = "too late"
            return
        judge_end(trial, outcome)
        trial.fail("incomplete file", *in_fork(lambda: judge.incomplete_files(work, IMAGES)))
        run_again(trial, scenario, expected)
        while (alive := still_alive(outcome.survivors)) and time.time() < outcome.struck + PATIENCE:
            time.sleep(0.05)
        trial.fail("wrong exit", *(f"process {pid} still runs after {PATIENCE:.0f} s" for pid in alive))


def run_setting(setting: Setting, kills: int, seed: int, folder: Path) -> Row:
    """Kill a number of commands of a setting."""
    adopt_orphans()
    row = Row(setting)
    began = time.monotonic()
    references = References(folder / "reference", row.notes)
    combinations: dict[str, deque[Any]] = {}
    for name in dict.fromkeys(setting.scenarios):
        found = SCENARIOS[name].kills()
        random.Random(f"{seed} {name}").shuffle(found)
        combinations[name] = deque(found)
    for index in range(2 * kills):
        if len(row.killed()) >= kills:
            break
        scenario = SCENARIOS[setting.scenarios[index % len(setting.scenarios)]]
        references.state(scenario, 0)
        make_kill = combinations[scenario.name][0]
        combinations[scenario.name].rotate(-1)
        kill = make_kill(random.Random(f"{seed} {setting.number} {index}"), references.times[scenario.name])
        trial = Trial(scenario.name, kill, folder / f"{setting.number}-{index}")
        try_kill(trial, scenario, references)
        row.trials.append(trial)
        if trial.failures:
            print(f"  {setting.number}-{index} {scenario.name}, {kill}", flush=True)
            for failure in trial.failures:
                print(f"      {failure.category}: {failure.detail}", flush=True)
        else:
            shutil.rmtree(trial.folder)
    row.seconds = time.monotonic() - began
    print(f"setting {setting.number}: {len(row.killed())} kills in {row.seconds:.0f} s", flush=True)
    return row


def table(rows: list[Row]) -> str:
    """Return the Markdown table."""
    header = ["command", "kills", "SIGKILL", "SIGTERM", "SIGINT", *_CATEGORIES]
    cells = [row.cells() for row in rows]
    total = ["all", *(str(sum(int(line[column]) for line in cells)) for column in range(1, len(header)))]
    lines = [header, ["---"] * len(header), *cells, total]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: list[Row]) -> str:
    """Return durations, ineffective kills, notes and failures."""
    lines = []
    for row in rows:
        verdicts = Counter(trial.verdict for trial in row.trials)
        lines.append(
            f"setting {row.setting.number}: {row.seconds:.0f} s; {verdicts['too late']} signals came too late, "
            f"{verdicts['not reached']} moments were not reached"
        )
    for row in rows:
        lines += [f"note: {note}" for note in row.notes]
        for trial in row.trials:
            if trial.failures:
                lines.append(f"FAILED {trial.scenario}, {trial.kill}: {trial.folder}")
                lines += [f"    {failure.category}: {failure.detail}" for failure in trial.failures]
    return "\n".join(lines)


def kills_by_setting(kills: int, settings: list[Setting]) -> list[int]:
    """Return the number of kills of each setting, at least one."""
    total = sum(setting.weight for setting in settings)
    return [max(1, -(-kills * setting.weight // total)) for setting in settings]


def main() -> int:
    """Run the program; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=320, help="number of kills in total (default: 320)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and signals (default: 0)")
    parser.add_argument("--only", type=int, nargs="+", metavar="SETTING", help="numbers of settings, 1 to 10")
    parser.add_argument("--jobs", type=int, default=1, help="number of settings in parallel (default: 1)")
    given = parser.parse_args()
    warm_up()
    settings = [setting for setting in SETTINGS if not given.only or setting.number in given.only]
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    rows = run_all(settings, kills_by_setting(given.kills, settings), given.seed, folder, given.jobs)
    failed = any(trial.failures for row in rows for trial in row.trials) or any(row.notes for row in rows)
    print(f"\n{summary(rows)}\n\n{table(rows)}")
    if failed:
        print(f"\nThe folders of failures are in {folder}")
    else:
        shutil.rmtree(folder)
    return int(failed)


def run_all(settings: list[Setting], kills: list[int], seed: int, folder: Path, jobs: int) -> list[Row]:
    """Kill commands of all settings, each setting in a fork."""
    waiting, running = deque(zip(settings, kills, strict=True)), set()
    while waiting or running:
        while waiting and len(running) < jobs:
            setting, count = waiting.popleft()
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                row = run_setting(setting, count, seed, folder / str(setting.number))
                (folder / f"{setting.number}.pickle").write_bytes(pickle.dumps(row))
                os._exit(0)
            running.add(pid)
        pid, status = os.wait()
        running.discard(pid)
        if status:
            raise SystemExit("a setting failed with an error")
    return [pickle.loads((folder / f"{setting.number}.pickle").read_bytes()) for setting in settings]


def warm_up() -> None:
    """Import modules that commands import on demand."""
    names = ("attrs", "matplotlib.pyplot", "networkx", "PIL.PngImagePlugin", "pyarrow.parquet", "torch.export")
    for name in (*names, "lsoftmax_lightning.commands", "sklearn.datasets", "sklearn.model_selection"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that the garbage collector of a fork copies no memory


if __name__ == "__main__":
    sys.exit(main())
