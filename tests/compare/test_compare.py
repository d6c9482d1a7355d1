"""Comparison of margins: planning, training, interruption and resume."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from select import select
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from lightning import Trainer
from rich.progress import TaskID
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typing_extensions import override

from lsoftmax_lightning.cli import main
from lsoftmax_lightning.compare import compare_margins
from lsoftmax_lightning.compare.planning import Run, plan
from lsoftmax_lightning.compare.training import Job, job_environment, train
from lsoftmax_lightning.compare.worker import ProgressFile
from lsoftmax_lightning.config_files import flat
from lsoftmax_lightning.errors import InputError, RunError
from lsoftmax_lightning.signals import SignalHandler

from ..helpers.command_line import FIRST_IS_BEST, QUIET, fails
from ..helpers.forked import run_on
from ..helpers.forked_runs import forked_runs  # noqa: F401

SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"]


@pytest.mark.usefixtures("forked_runs")
def test_comparison_trains_and_a_second_call_continues(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = {"model.label_smoothing": [0, 0.1]}
    rows = compare_margins("digits", [1, 2], [0], SHORT, sweep, jobs=2)
    folder = Path("runs/compare-digits")
    assert [(row["margin"], row["model.label_smoothing"], row["seed"]) for row in rows] == [
        (1, 0, 0),
        (2, 0, 0),
        (1, 0.1, 0),
        (2, 0.1, 0),
    ]
    assert all(row["steps"] == 3 and row["seconds"] > 0 and "test/acc" in row for row in rows)
    assert "val/loss" in rows[0]  # the metric that chose the checkpoint
    assert "m2-label_smoothing=0.1-s0" in capsys.readouterr().out
    run = folder / "m2-label_smoothing=0.1-s0"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "checkpoints", "results.json", "run.json", "test.pt", "log.txt"} <= names
    figures = {f"{name}-model.label_smoothing={value}" for name in ("angles", "curves") for value in (0, 0.1)}
    assert figures | {"accuracy"} <= {path.stem for path in folder.glob("*.png")}
    table = (folder / "table.md").read_text()
    assert "compare --config digits --margins 1 2 --seeds 0 --sweep model.label_smoothing=0,0.1 --jobs 2 " in table

    # fit with the same settings gives the same results
    hand = ["--model.margin=2", "--model.label_smoothing=0.1", "--seed_everything=0"]
    main(["fit", "--config", "digits", *SHORT, *hand])
    by_hand = json.loads(Path("runs/digits/m2-s0/results.json").read_text())
    assert json.loads((run / "results.json").read_text()) == pytest.approx(by_hand, rel=1e-4)
    assert "val/angle" in EventAccumulator(str(run)).Reload().Tags()["scalars"]

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/run.json")}
    capsys.readouterr()
    assert len(compare_margins("digits", [1, 2], [0, 1], SHORT, {"model.label_smoothing": [0]}, jobs=2)) == 6
    assert "2 of 4 runs are already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before

    same_setting = {"model.init_args.label_smoothing": [0]}
    assert len(compare_margins("digits", [1, 2], [0, 1], SHORT, same_setting, jobs=2)) == 6

    averaged = Path("averaged")
    rows = compare_margins(
        "digits", [2], [0], SHORT, average={"model.label_smoothing": [0, 0.1]}, folder=averaged, html=True
    )
    assert [row["averaged"] for row in rows] == ["model.label_smoothing"] * 2
    assert "--average model.label_smoothing=0,0.1 --folder averaged --html " in rows[0]["command"]
    assert (averaged / "table.md").read_text().splitlines()[2].startswith("| 2 | 2 | ")

    made = (folder / "table.md").read_text()
    (folder / "table.md").unlink()
    main(["compare", "--report", str(folder)])
    assert (folder / "table.md").read_text() == made

    # runs with other settings are rejected, with the name of an existing run and with a new name
    for margin in (1, 3):
        with pytest.raises(InputError, match="has a run with other settings") as caught:
            compare_margins("digits", [margin], [0], [*SHORT, "--data.batch_size=32"], {"model.label_smoothing": [0]})
        assert "got data.batch_size 64 in " in str(caught.value)
        assert " and 32 in this comparison" in str(caught.value)


class InterruptAt25(ProgressFile):
    """Send a signal to the comparison or to this process at step 25, within an epoch."""

    target = "comparison"
    signum = signal.SIGKILL

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 25:
            comparison = os.getppid()
            os.kill(comparison if self.target == "comparison" else os.getpid(), self.signum)
            # until the end of the comparison, or until the signal is noticed
            while os.getppid() == comparison and SignalHandler.latest < 0:
                time.sleep(0.01)
        super().on_train_batch_end(trainer, *args, **kwargs)


@pytest.mark.parametrize(
    ("signum", "target", "code", "message"),
    [
        (signal.SIGKILL, "comparison", -9, ""),
        (signal.SIGINT, "comparison", 130, "Repeat the command to resume.\nStopped by SIGINT.\n"),
        pytest.param(
            signal.SIGTERM,
            "worker",
            1,
            "error: 1 of 1 runs failed; the same command tries them again.",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.usefixtures("forked_runs")
def test_interrupted_comparison_resumes_exactly(
    signum: signal.Signals, target: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*QUIET, "--trainer.max_steps=60", "--trainer.limit_train_batches=10", *FIRST_IS_BEST]
    ended, held_by_all = os.pipe()
    with monkeypatch.context() as patch:
        patch.setattr("lsoftmax_lightning.compare.worker.ProgressFile", InterruptAt25)
        patch.setattr(InterruptAt25, "signum", signum)
        patch.setattr(InterruptAt25, "target", target)
        command = ["compare", "--config=digits.yaml", "--margins=2", "--seeds=3", *args]
        done = run_on(1, partial(main, command), lambda rank, count, port: {})
    assert done.returncode == code
    assert done.stderr.startswith(message)
    os.close(held_by_all)
    assert select([ended], [], [], 120)[0]  # the run has ended, too
    os.close(ended)
    assert_resumes_exactly(args, 60)


@pytest.mark.slow
def test_interrupted_comparison_in_subprocesses_resumes_exactly() -> None:
    args = [*QUIET, "--trainer.max_epochs=20", "--trainer.limit_train_batches=10", *FIRST_IS_BEST]
    command = ["compare", "--config=digits.yaml", "--margins=2", "--seeds=3", *args]
    comparison = subprocess.Popen(
        [sys.executable, "-m", "lsoftmax_lightning", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = Path("runs/compare-digits/m2-s3").absolute()
    deadline = time.monotonic() + 300
    while steps_of(run) < 10:
        assert time.monotonic() < deadline
        assert comparison.poll() is None
        time.sleep(0.05)
    comparison.send_signal(signal.SIGINT)
    _, printed = comparison.communicate(timeout=120)
    assert printed.startswith("Repeat the command to resume.\nStopped by SIGINT.\n")
    assert_resumes_exactly(args, 200)


def assert_resumes_exactly(args: list[str], steps: int) -> None:
    """Continue a comparison, and compare its run with an uninterrupted one.

    The best checkpoint is that of the first epoch, so that a run that loses it tests another one.
    """
    run = Path("runs/compare-digits/m2-s3")
    assert not (run / "run.json").exists()
    assert 0 < torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] < steps
    (row,) = compare_margins("digits.yaml", [2], [3], args)
    assert row["steps"] == steps
    assert row["seconds"] is None  # unknown, because the run was interrupted
    main(["fit", "--config=digits.yaml", "--model.margin=2", "--seed_everything=3", *args])
    whole = json.loads(Path("runs/digits/m2-s3/results.json").read_text())
    assert {name: row[name] for name in whole} == whole


def steps_of(run: Path) -> float:
    path = run / "progress"
    return float((path.read_text().split() or [0])[0]) if path.is_file() else 0


@pytest.mark.slow
def test_run_on_several_devices_with_a_progress_bar_finishes() -> None:
    bar = [word for word in SHORT if "progress_bar" not in word]
    (row,) = compare_margins("digits.yaml", [2], [0], [*bar, "--trainer.devices=2", "--trainer.strategy=ddp"])
    assert row["steps"] == 3


@pytest.mark.usefixtures("forked_runs")
def test_failed_run_is_reported_and_the_others_finish(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = {"model.optimizer.lr": ["1e30", "5e-2"], "model.lr_scheduler.milestones": [[0.5, 0.75]]}
    with pytest.raises(RunError, match="1 of 2 runs failed") as caught:
        compare_margins("digits", [1], [0], [*SHORT, "--checkpoint.monitor=val/acc"], sweep, jobs=2)
    name = "m1-lr=1e30-milestones=_0.5,_0.75_-s0"
    for part in (f"{name}: error: The training loss was NaN or infinite", "log.txt"):
        assert part in str(caught.value)
    assert f"{name}: failed" in capsys.readouterr().out
    assert len(Path("runs/compare-digits/results.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("args", "error_text"),
    [
        ([], "--config: is required"),
        (["--config=nope.yaml"], "no config 'nope.yaml'"),
        (["--config=digits.yaml", "--margins", "1", "0"], "integer from 1 to 100"),
        (["--config=digits.yaml", "--margins", "1.5"], "1.5"),
        (["--config=digits.yaml", "--margins", "2", "2"], "margins: must be one or more distinct values"),
        (["--config=digits.yaml", "--seeds", "2", "--seeds", "3", "2"], "got [2, 3, 2]"),
        (["--config=digits.yaml", "--jobs=0"], "jobs: must be at least 1"),
        (["--config=digits.yaml", "--trainer.epochs=3"], "trainer.epochs"),
        (["--config=digits.yaml", "--trainer.fast_dev_run=true"], "trainer.fast_dev_run: leaves no results to compare"),
        (["--config=digits.yaml", "--model.margin", "3"], "use --margins, --seeds or --folder"),
        (["--config=digits.yaml", "--seed_everything=3"], "use --margins, --seeds or --folder"),
        (["--config=digits.yaml", "--sweep", "model.margin=3,4"], "use --margins, --seeds or --folder"),
        (
            ["--config=digits.yaml", "--sweep", "model.optimizer.lr"],
            "model.optimizer.lr: must be one or more distinct values",
        ),
        (["--config=digits.yaml", "--sweep", "model.optimizer.lr=[1"], "--sweep: must be KEY=V1,V2"),
        (["--config=digits.yaml", "--sweep", "model.nope=1"], "nope"),
        (["--config=digits.yaml", "--sweep=model.init_args.margin=3,4"], "use --margins, --seeds or --folder"),
        (["--config=digits.yaml", "--model.init_args.margin=3"], "use --margins, --seeds or --folder"),
        (["--config=digits.yaml", "--ckpt_path=last.ckpt"], "use --margins, --seeds or --folder"),
        (["--config=digits.yaml", "--checkpoint.dirpath=here"], "use --margins, --seeds or --folder"),
        (["--config=digits.yaml", "--seeds", "-1"], "seeds: must be from 0 to 4294967295, got -1"),
        (["--config=digits.yaml", "--seeds", "4294967296"], "seeds: must be from 0 to 4294967295, got 4294967296"),
        (["--config=digits.yaml", "--margins", "1000000000"], "margin: must be an integer from 1 to 100"),
        (["--config=digits.yaml", "--sweep=data.val_size=0.1,1e-1"], "have the same name or settings"),
        (["--config=digits.yaml", "--average", "data.val_size"], "data.val_size: must be one or more distinct values"),
        (["--config=digits.yaml", "--average", "data.val_size=[1"], "--average: must be KEY=V1,V2"),
        (
            ["--config=digits.yaml", "--average", "a.b=1", "--sweep", "a.b=2"],
            "--sweep and --average: have a duplicate setting, got a.b twice",
        ),
        (
            ["--config=digits.yaml", "--sweep=model.backbone=a", "--sweep=model.init_args.backbone=b"],
            "--sweep and --average: have a duplicate setting, got model.backbone twice",
        ),
        (
            ["--config=digits.yaml", "--sweep=a.b=1", "--sweep=a.b=2"],
            "--sweep: has a duplicate setting, got a.b twice",
        ),
        (
            ["--config=digits.yaml", "--sweep=model.label_smoothing=0,0.1", "--model.init_args.label_smoothing=0.1"],
            "model.label_smoothing: must be fixed or swept, got both",
        ),
        (["--config=folder.yaml", "--sweep=data.root=2020-01-01"], "2020-01-01/train: the folder does not exist"),
        (["--config=folder.yaml", "--sweep=data.root=2020-01-01T10:00:00Z"], "2020-01-01T10:00:00Z/train: the folder"),
        (["--config=digits.yaml", "--average", "model.margin=3,4"], "use --margins, --seeds or --folder"),
        (["--report=gone"], "no run in"),
        (["--report", "gone", "--jobs", "2"], "accepts only --folder"),
        (["--report=gone", "--config=digits.yaml"], "accepts only --folder"),
        (["--report=gone", "--margins", "2"], "accepts only --folder"),
    ],
)
def test_wrong_arguments_fail_before_training(
    args: list[str], error_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_text in fails(capsys, "compare", *args)
    assert not Path("runs").exists()


def test_missing_data_are_reported_before_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    assert "copy them from another machine" in fails(
        capsys, "compare", "--config=mnist.yaml", "--data.root=gone", *QUIET
    )
    assert not Path("runs").exists()


def test_two_comparisons_do_not_share_a_folder() -> None:
    Path("mine").mkdir()
    with (
        FileLock("mine/.lock"),
        pytest.raises(InputError, match=r"^--folder: is in use by another comparison, got .*/mine; wait"),
    ):
        compare_margins("digits", [1], [0], SHORT, folder="mine")


def test_jobs_divide_devices_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert [job_environment(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["4,7", "5"]
    assert [job_environment(slot, 4)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["4", "5", "7", "4"]
    assert job_environment(0, 4)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in job_environment(0, 1)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "3")
    assert job_environment(0, 4)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "")
    assert job_environment(0, 4)["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(("threads", "expected"), [("4,2", 4), ("", 8), ("x", 8)])
def test_any_value_of_omp_num_threads_starts_a_run(
    threads: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(monkeypatch)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert not train([Run(tmp_path / "m1-s0", {}, {})], 1, tmp_path, {})
    assert json.loads((tmp_path / "m1-s0" / "run.json").read_text())["threads"] == expected


def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Let runs end at once, and return the list of their environments."""
    environments: list[dict[str, str]] = []

    class Process:
        returncode = 0

        def __init__(self, args: list[str], env: dict[str, str], **kwargs: Any) -> None:
            environments.append(env)
            (Path(args[3]) / "results.json").write_text('{"test/acc": 0.5}')

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("lsoftmax_lightning.compare.training.subprocess.Popen", Process)
    return environments


def test_jobs_divide_devices_and_cores_among_unfinished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments = started(monkeypatch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    runs = [Run(tmp_path / f"m1-s{seed}", {"margin": 1, "seed": seed}, {}) for seed in range(3)]
    train(runs[:1], 8, tmp_path, {})
    train(runs, 8, tmp_path, {})
    first, *others = [(env.get("OMP_NUM_THREADS"), env["CUDA_VISIBLE_DEVICES"]) for env in environments]
    assert first == (None, "0,1,2,3")
    assert others == [("8", "0,2"), ("8", "1,3")]


@pytest.mark.parametrize("name", ["file", "file/sub", "file/sub/sub"])
def test_folder_that_is_or_is_inside_a_file_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=f"^--folder: is a file or inside a file, got {tmp_path}/{name}; choose a folder"
    ):
        train([], 1, tmp_path / name, {})


def test_file_with_the_name_of_a_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m1-s0").write_text("mine")
    with pytest.raises(InputError, match=f"^--folder: has a file with the name of a run, got {tmp_path}/m1-s0; move"):
        plan(["digits"], [1], [0], SHORT, {}, tmp_path)
    assert (tmp_path / "m1-s0").read_text() == "mine"


def test_error_of_a_run_is_not_reported_as_one_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise FileExistsError("of the run")

    monkeypatch.setattr("lsoftmax_lightning.compare.training.subprocess.Popen", fail)
    with pytest.raises(FileExistsError, match="of the run"):
        train([Run(tmp_path / "m1-s0", {}, {})], 1, tmp_path, {})


def test_removal_of_a_run_without_last_checkpoint_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started(monkeypatch)
    best = tmp_path / "m1-s0" / "checkpoints" / "best.ckpt"
    best.parent.mkdir(parents=True)
    best.write_text("")
    (tmp_path / "m1-s0" / "run.json").write_text("{")
    train([Run(tmp_path / "m1-s0", {"margin": 1, "seed": 0}, {})], 1, tmp_path, {})
    assert not best.exists()
    printed = "".join(capsys.readouterr().out.split())
    assert f"{tmp_path}/m1-s0isremoved,anditsrunstartsfromthebeginning" in printed


@pytest.mark.usefixtures("forked_runs")
def test_damaged_files_of_an_unfinished_run_are_rewritten_and_it_resumes() -> None:
    compare_margins("digits", [2], [0], SHORT)
    run = Path("runs/compare-digits/m2-s0")
    path, whole = run / "config.yaml", (run / "config.yaml").read_text()
    plans = partial(plan, ["digits"], [2], [0], SHORT, {}, run.parent.absolute())
    facts = (run / "run.json").read_text()

    # finished
    path.write_text("")
    with pytest.raises(
        InputError, match=r"is missing or damaged, but its run is finished; restore the file, or remove"
    ):
        plans()
    path.unlink()
    with pytest.raises(
        InputError, match=r"is missing or damaged, but its run is finished; restore the file, or remove"
    ):
        plans()
    path.write_text(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plans()[0].finished

    # not finished
    (run / "run.json").unlink()
    parts = [whole[:cut] for cut in range(0, len(whole), max(1, len(whole) // 10))]
    parts = [part for part in parts if whole[len(part) :].strip() != "null"]  # a missing null changes nothing
    for content in [*map(str.encode, parts), b"\x00" * 100, b"caf\xe9", b"text", b"[1]"]:
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=r"config\.yaml is incomplete and is replaced; checkpoints in .* are kept"):
            assert not plans()[0].finished
    cut = whole[: whole.index("accumulate_grad_batches")].replace("max_epochs: 1", "max_epochs: 7")
    path.write_text(cut)
    with (
        pytest.warns(UserWarning, match="is incomplete"),
        pytest.raises(InputError, match=r"trainer\.max_epochs 7 in .* and 1 in this comparison"),
    ):
        plans()

    # a finished run with damaged results resumes from its last checkpoint
    path.write_bytes(b"")
    (run / "run.json").write_text(facts[:50])
    with (
        pytest.warns(UserWarning, match="config.yaml is incomplete"),
        pytest.warns(UserWarning, match=r"run\.json is missing or damaged; its run counts as unfinished"),
    ):
        (row,) = compare_margins("digits", [2], [0], SHORT)
    assert (row["steps"], row["seconds"]) == (3, None)
    assert flat(yaml.safe_load(path.read_text())).keys() == flat(yaml.safe_load(whole)).keys()
    assert {path.name for path in run.parent.iterdir() if path.is_dir()} == {"m2-s0"}
    assert not list(run.parent.rglob("*.part"))


def test_damaged_progress_files_are_ignored(tmp_path: Path) -> None:
    job = Job(Run(tmp_path, {}, {}), 0, 1, process=None, task=TaskID(0), resumed=False)  # type: ignore[arg-type]
    for content in (b"", b"3", b"caf\xe9 \xff", b"1 x"):
        (tmp_path / "progress").write_bytes(content)
        job.poll()
    assert (job.steps, job.total_steps) == (0, math.inf)
    (tmp_path / "progress").write_text("3 9")
    job.poll()
    assert (job.steps, job.total_steps) == (3, 9)


@pytest.mark.parametrize("total", ["-1", "inf", "0"])
def test_a_run_of_unknown_length_has_no_fraction(total: str, tmp_path: Path) -> None:
    (tmp_path / "progress").write_text(f"500 {total}")
    job = Job(Run(tmp_path, {}, {}), 0, 1, process=None, task=TaskID(0), resumed=False)  # type: ignore[arg-type]
    job.poll()
    assert (job.steps, job.total_steps, job.fraction) == (500, math.inf, 0)
