"""Stopped runs resume and end with the same weights."""

import json
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lsoftmax_lightning.__main__
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.datamodules import loader
from lsoftmax_lightning.lightning_cli import LSoftmaxCLI
from lsoftmax_lightning.signals import ignore_signals
from lsoftmax_lightning.user_errors import errors_without_traceback

from .helpers.command_line import FIRST_IS_BEST, QUIET, SHORT, fails
from .helpers.forked import launch, run_on
from .helpers.formats import write_folder
from .helpers.interrupted import TerminateAt, train
from .helpers.training import file_size_limit

ROOT = str(Path(__file__).parents[1])
LONG = [
    "fit",
    "--config=digits.yaml",
    *QUIET,
    # components that have a state or draw random numbers
    "--model.backbone={class_path: tests.helpers.interrupted.Random}",
    "--data=tests.helpers.interrupted.Shifted",
    "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
    "--model.lr_scheduler.monitor=val/loss",
    "--model.lr_scheduler.patience=1",
    "--model.lr_scheduler.factor=0.7",
    "--model.lr_scheduler_interval=epoch",
]
EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130}
KILLS = ["SIGKILL", "batch", "validation", "checkpoint"]
VALIDATED_WITHIN_EPOCHS = ["--trainer.val_check_interval=7", "--trainer.check_val_every_n_epoch=null"]
ACCUMULATED = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=0.5"]


def last(folder: str | Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(Path(folder, "checkpoints/last.ckpt"), weights_only=True)
    return checkpoint


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("epochs", "stops", "settings"),
    [
        pytest.param(10, KILLS, [], id="killed"),
        pytest.param(10, ["SIGTERM", "SIGINT"], VALIDATED_WITHIN_EPOCHS, id="signalled"),
        pytest.param(10, ["SIGTERM", "batch", "SIGINT"], ACCUMULATED, id="accumulating", marks=pytest.mark.slow),
        pytest.param(30, 3 * KILLS, [], id="killed often", marks=pytest.mark.slow),
        pytest.param(
            30, 5 * ["SIGTERM", "SIGINT"], VALIDATED_WITHIN_EPOCHS, id="signalled often", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_stopped_at_random_moments_resumes_exactly(epochs: int, stops: list[str], settings: list[str]) -> None:
    args = [*LONG, *settings, f"--trainer.max_epochs={epochs}"]
    whole = run_on(1, partial(main, [*args, "--trainer.logger.name=whole"]))
    assert whole.returncode == 0, whole.stderr
    args += ["--trainer.logger.name=stopped", "--ckpt_path=last"]
    for seed, stop in enumerate(stops):
        done = run_on(1, partial(train, args, stop, seed))
        assert done.returncode == EXIT_CODES.get(stop, -signal.SIGKILL), (seed, stop, done.stderr)
        assert "Traceback" not in done.stderr
    done = run_on(1, partial(main, args))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    # a run that is stopped before its first checkpoint starts again, in a new folder
    folders = [
        Path("runs/whole/m4-s0"),
        max(Path("runs/stopped").iterdir(), key=lambda path: (path / "config.yaml").stat().st_mtime_ns),
    ]
    one, other = map(last, folders)
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(one[part], other[part])
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert results[0] == results[1]
    # equal curves
    for tag in ("val/loss", "lambda"):
        events = [EventAccumulator(str(folder)).Reload().Scalars(tag) for folder in folders]
        curves = [[(event.step, event.value) for event in curve] for curve in events]
        assert sorted(set(curves[1])) == sorted(set(curves[0]))


@pytest.mark.parametrize(
    ("at", "lines", "end"), [(9, {"lambda": [9]}, 10), (19, {"lambda": [9, 19], "train/acc": [19]}, 20)]
)
def test_metrics_before_a_stop_are_logged(at: int, lines: dict[str, list[int]], end: int) -> None:
    class Signal(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == at:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        LSoftmaxCLI(["fit", "--config=digits.yaml", *QUIET], callbacks=[Signal()])
    assert caught.value.code == 143
    events = EventAccumulator("runs/digits/m4-s0").Reload()
    assert {name: [event.step for event in events.Scalars(name)] for name in lines} == lines
    assert last("runs/digits/m4-s0")["global_step"] == end


class Send(Callback):
    """Send a signal to this process, or the process group, in a hook of one rank."""

    def __init__(self, signum: signal.Signals, hook: str, rank: int = 0, group: bool = False) -> None:
        def send(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_rank == rank:
                setattr(self, hook, lambda *args, **kwargs: None)
                (os.killpg if group else os.kill)(os.getpgrp() if group else os.getpid(), signum)

        setattr(self, hook, send)


def run_cli(args: list[str], *callbacks: Callback) -> None:
    with errors_without_traceback():
        LSoftmaxCLI(args, callbacks=callbacks)


OUTSIDE_OF_TRAINING = [
    ("fit", "setup", signal.SIGTERM),
    ("fit", "on_sanity_check_start", signal.SIGINT),
    ("fit", "on_test_batch_end", signal.SIGTERM),
    ("fit", "on_fit_end", signal.SIGINT),
    ("validate", "on_validation_batch_end", signal.SIGTERM),
    ("test", "on_test_start", signal.SIGINT),
    ("test", "on_test_end", signal.SIGTERM),
    ("predict", "on_predict_batch_end", signal.SIGINT),
    ("predict", "on_predict_end", signal.SIGTERM),
]


@pytest.mark.parametrize(("command", "hook", "signum"), OUTSIDE_OF_TRAINING)
@pytest.mark.filterwarnings("ignore:No --ckpt_path")
def test_a_signal_outside_of_training_ends_with_its_code(command: str, hook: str, signum: signal.Signals) -> None:
    args = [command, "--config=digits.yaml", *(SHORT if command == "fit" else QUIET)]
    done = run_on(1, lambda: run_cli(args, Send(signum, hook)))
    assert done.returncode == 128 + signum, done.stderr
    assert done.stderr.splitlines()[-1] == f"Stopped by {signum.name}."
    assert "Traceback" not in done.stderr
    assert len(list(Path().rglob("predictions*.csv"))) == (hook == "on_predict_end")
    assert len(list(Path().rglob("checkpoints/last.ckpt"))) == (hook in ("on_test_batch_end", "on_fit_end"))


@pytest.mark.parametrize("command", [pytest.param("test", marks=pytest.mark.slow), "predict"])
def test_signal_to_one_rank_ends_all_ranks(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [command, "--config=digits.yaml", *QUIET, "--trainer.devices=2", "--trainer.strategy=ddp"]
    send = Send(signal.SIGTERM, f"on_{command}_batch_end", rank=1)
    # rank 1 gets the signal of rank 0 while Python exits, and is killed by it
    kill = _SubprocessScriptLauncher.kill
    monkeypatch.setattr(_SubprocessScriptLauncher, "kill", lambda *args: (time.sleep(1), kill(*args)))
    Path("program.py").write_text(
        "import atexit, signal, time\nfrom tests.test_interruption import Send, run_cli\n"
        "atexit.register(time.sleep, 3)\n"
        f"run_cli({args}, Send(signal.SIGTERM, 'on_{command}_batch_end', rank=1))\n"
    )
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.setattr(_ChildProcessObserver.__init__, "__defaults__", (0.01,))  # seconds between two checks
    began = time.monotonic()
    done = launch(lambda: run_cli(args, send))
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Stopped by SIGTERM.") == 1
    assert time.monotonic() - began < 60


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_workers_survive_a_signal_to_the_process_group() -> None:
    def ignore_late(worker_id: int) -> None:
        """Give the second worker a slow start, during which the signal arrives."""
        time.sleep(worker_id)
        ignore_signals()

    write_folder(Path("images"))
    data = ["--data.root=images", "--data.memory_gib=0", "--data.num_workers=2", "--data.batch_size=4"]
    network = ["--data.image_size=16", "--data.crop_padding=2", "--model.backbone=digits"]
    args = ["fit", "--config=folder.yaml", *data, *network, *QUIET, "--trainer.max_epochs=2"]

    def stopped() -> None:
        os.setpgrp()
        loader.ignore_signals = ignore_late  # type: ignore[assignment]
        run_cli(args, Send(signal.SIGTERM, "on_before_optimizer_step", group=True))

    done = run_on(1, stopped)
    assert done.returncode == 143, done.stderr
    (path,) = Path().rglob("last.ckpt")
    assert f"continue from {path}" in done.stderr
    assert "Traceback" not in done.stderr
    main([*args, "--ckpt_path=last"])
    one = last(path.parents[1])
    main([*args, "--trainer.logger.name=whole"])
    assert_same(one["state_dict"], last("runs/whole/m4-s0")["state_dict"])


@pytest.mark.parametrize("content", ["", "seed_everything: 0\nmodel:\n  class", "model: [", "\udcff"])
def test_run_with_a_truncated_config_continues(content: str) -> None:
    with pytest.warns(UserWarning, match="There is no"):
        main(["fit", "--config=digits.yaml", *SHORT, "--ckpt_path=last"])
    config = Path("runs/digits/m2-s0/config.yaml")
    whole = config.read_text()
    hparams = config.with_name("hparams.yaml").read_text()
    for path in (config, config.with_name("hparams.yaml")):
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"config.yaml is not complete"):
        cli = main(["fit", "--config=digits.yaml", *SHORT, "--ckpt_path=last"])
    assert cli is not None
    assert config.read_text() == whole
    assert config.with_name("hparams.yaml").read_text() == hparams


def test_config_of_a_run_is_written_atomically(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="There is no"):
        main(["fit", "--config=digits.yaml", *SHORT, "--ckpt_path=last"])
    config = Path("runs/digits/m2-s0/config.yaml")
    before = config.read_text()
    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["fit", "--config=digits.yaml", *SHORT, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert config.read_text() == before


@pytest.mark.slow
def test_two_ranks_stop_together_and_resume_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)
    args = [*LONG, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.enable_progress_bar=true"]
    args += ["--trainer.max_epochs=16"]  # ranks agree to stop once a second, in which a fast machine takes 200 steps
    whole = run_on(2, partial(main, [*args, "--trainer.logger.name=whole"]))
    assert whole.returncode == 0, whole.stderr
    args += ["--trainer.logger.name=stopped", "--ckpt_path=last"]
    stop = [f"--trainer.callbacks+={TerminateAt.__module__}.TerminateAt", "--trainer.callbacks.step=25"]
    stopped = launch(partial(main, [*args, *stop]), *args, *stop, program=lsoftmax_lightning.__main__)
    assert stopped.returncode == 143, stopped.stderr
    assert (stopped.stdout + stopped.stderr).count("Stopped after") == 1
    assert 25 < last("runs/stopped/m4-s0")["global_step"] < 320
    done = run_on(2, partial(main, args))
    assert done.returncode == 0, done.stderr
    one, other = last("runs/whole/m4-s0"), last("runs/stopped/m4-s0")
    assert_same(one["state_dict"], other["state_dict"])


@pytest.mark.filterwarnings("ignore:There is no runs/digits/")
def test_last_is_the_last_run_of_fit_and_continues_in_its_folder(caplog: pytest.LogCaptureFixture) -> None:
    fit = ["fit", "--config=digits.yaml", *SHORT, "--ckpt_path=last"]
    main(fit)
    Path("runs/digits/m2-s0-2").mkdir()  # the folder of a test
    cli = main([*fit, "--trainer.max_epochs=2"])
    assert cli is not None
    assert cli.trainer.global_step == 6
    assert "Resuming runs/digits/m2-s0 with changed settings:\n  trainer.max_epochs 1 -> 2" in caplog.messages
    assert {path.name for path in Path("runs/digits").iterdir()} == {"m2-s0", "m2-s0-2"}
    saved = yaml.safe_load(Path("runs/digits/m2-s0/config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 2
    assert saved["ckpt_path"] is saved["trainer"]["logger"]["init_args"]["version"] is None
    results = json.loads(Path("runs/digits/m2-s0/results.json").read_text())
    del results["val/loss"]
    main(["test", "--config=digits.yaml", *QUIET, "--model.margin=2", "--ckpt_path=best"])
    assert json.loads(Path("runs/digits/m2-s0/test/results.json").read_text()) == pytest.approx(results)


CSV_FIRST = """[{class_path: CSVLogger, init_args: {save_dir: runs, name: csv}},
{class_path: TensorBoardLogger, init_args: {save_dir: runs, name: digits, default_hp_metric: false}}]"""
NAMED_BY_METRIC = ["--checkpoint.filename={epoch}-{val/acc:.2f}", "--checkpoint.save_top_k=2"]


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ([f"--trainer.logger={CSV_FIRST}"], "runs/digits/m2-s0"),
        (["--trainer.logger.save_dir=~/runs", "--trainer.logger.sub_dir=sub"], "home/runs/digits/m2-s0"),
        (["--trainer.logger.save_dir=$SCRATCH/runs", *NAMED_BY_METRIC], "scratch/runs/digits/m2-s0"),
        (["--trainer.logger.version=mine"], "runs/digits/mine"),
        (["--trainer.default_root_dir=root"], "root/runs/digits/m2-s0"),
        (["--checkpoint.dirpath=$SCRATCH/best"], "runs/digits/m2-s0"),
    ],
)
def test_last_and_best_are_found_in_any_run_folder(
    settings: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    main(["fit", "--config=digits.yaml", *SHORT, *settings])
    again = [] if settings == ["--trainer.logger.version=mine"] else settings
    cli = main(["fit", "--config=digits.yaml", *SHORT, *again, "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert cli is not None
    assert cli.trainer.global_step == 6
    assert last(folder)["global_step"] == 6
    (results,) = (json.loads(path.read_text()) for path in Path().rglob("results.json"))
    assert len(list(Path().rglob("last.ckpt"))) == len(list(Path().rglob("config.yaml"))) == 1
    assert not [path for path in Path().rglob("*") if "~" in str(path) or "$" in str(path)]
    again = [setting for setting in again if "checkpoint" not in setting]  # read from the config of the run
    tested = main(["test", "--config=digits.yaml", *QUIET, "--model.margin=2", *again, "--ckpt_path=best"])
    assert tested is not None
    test_results = json.loads(Path(str(tested.trainer.log_dir), "results.json").read_text())
    assert test_results == pytest.approx({name: value for name, value in results.items() if name.startswith("test/")})


def test_a_run_without_a_checkpoint_is_not_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config=digits.yaml", *SHORT]
    main(fit)
    failing = [*fit, "--model.optimizer.lr=1e30"]
    fails(capsys, *failing)
    assert Path("runs/digits/m2-s0-2/config.yaml").is_file()
    assert not Path("runs/digits/m2-s0-2/checkpoints/last.ckpt").exists()
    main(["test", "--config=digits.yaml", *QUIET, "--model.margin=2", "--ckpt_path=best"])
    cli = main([*fit, "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert cli is not None
    assert cli.trainer.global_step == 6
    os.utime("runs/digits/m2-s0-2/config.yaml")  # the failed run is the last one again
    with pytest.warns(UserWarning, match=r"There is no runs/digits/m2-s0-2/checkpoints/last.ckpt to resume from"):
        fails(capsys, *failing, "--ckpt_path=last")  # it does not continue the other run with these settings


@pytest.mark.parametrize("how", ["path", "moved", "renamed"])
def test_resumed_run_tests_the_best_of_all_epochs(how: str) -> None:
    fit = ["fit", "--config=digits.yaml", *SHORT, *FIRST_IS_BEST]
    main([*fit, "--trainer.max_epochs=4", "--trainer.logger.name=whole"])
    whole = json.loads(Path("runs/whole/m2-s0/results.json").read_text())
    main([*fit, "--trainer.max_epochs=2"])
    run, resume = Path("runs/digits/m2-s0"), ["--ckpt_path=last"]
    if how == "path":
        resume = [f"--ckpt_path={run}/checkpoints/last.ckpt"]
    elif how == "moved":
        Path("elsewhere").mkdir()
        run.parent.rename("elsewhere/digits")
        resume += ["--trainer.logger.save_dir=elsewhere"]
    else:
        run.rename(run.with_name("mine"))
        resume += ["--trainer.logger.version=mine"]
    cli = main([*fit, "--trainer.max_epochs=4", *resume])
    assert cli is not None
    folder = Path(str(cli.trainer.log_dir))
    assert json.loads((folder / "results.json").read_text()) == whole
    assert json.loads((folder / "checkpoints/index.json").read_text()) == {"best": "best.ckpt", "last": "last.ckpt"}


def test_a_full_disk_is_an_error_and_keeps_the_previous_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit = ["fit", "--config=digits.yaml", *SHORT, "--ckpt_path=last"]
    with pytest.warns(UserWarning, match="There is no"):
        main(fit)
    before = last("runs/digits/m2-s0")
    with file_size_limit(20_000):
        printed = fails(capsys, *fit, "--trainer.max_epochs=2")
        last_alone = fails(capsys, *fit, "--trainer.max_epochs=2", "--checkpoint.save_top_k=0")
    assert "best.ckpt could not be written: File too large" in printed
    assert "last.ckpt could not be written: File too large" in last_alone
    assert not list(Path().rglob("*.part"))
    assert_same(last("runs/digits/m2-s0"), before)
    cli = main([*fit, "--trainer.max_epochs=2"])
    assert cli is not None
    assert cli.trainer.global_step == 6


def test_resume_with_another_seed_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="There is no"):
        main(["fit", "--config=digits.yaml", *SHORT, "--ckpt_path=last"])
    capsys.readouterr()
    printed = fails(capsys, "fit", "--config=digits.yaml", *SHORT, "--ckpt_path=last", "--seed_everything=1")
    assert "Best checkpoint" not in printed
    assert "seed_everything: must be the seed of the run, 0, to repeat its shuffle and draws, got 1;" in printed


@pytest.mark.filterwarnings("ignore:There is no")
def test_resume_rejects_other_optimizers_and_reports_settings_without_effect(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit = ["fit", "--config=digits.yaml", *SHORT, "--ckpt_path=last"]
    main(fit)
    before = Path("runs/digits/m2-s0/config.yaml").read_text()
    for part, kind in (("optimizer", "torch.optim.Adam"), ("lr_scheduler", "null")):
        assert f"model.{part}: must be" in fails(capsys, *fit, f"--model.{part}={kind}")
    assert Path("runs/digits/m2-s0/config.yaml").read_text() == before
    main([*fit, "--model.lr_scheduler_interval=epoch"])  # has an effect, so there is no warning
    with pytest.warns(UserWarning, match="changes of them have no effect"):
        cli = main([*fit, "--trainer.max_epochs=2", "--model.optimizer.lr=0.01"])
    assert cli is not None
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0005)


class Swallow(Callback):
    """Send SIGTERM while a destructor runs, in which Python ignores exceptions."""

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        class Resource:
            def __del__(self) -> None:
                os.kill(os.getpid(), signal.SIGTERM)

        Resource()


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    done = run_on(1, lambda: run_cli(["fit", "--config=digits.yaml", *SHORT], Swallow()))
    assert done.returncode == 143, done.stderr
    assert not list(Path().rglob("results.json"))


class FailInTeardown(Callback):
    """Raise another error when the run is interrupted."""

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        raise OSError("Writer is closed")


def test_an_error_after_a_signal_does_not_hide_it() -> None:
    send = Send(signal.SIGTERM, "on_test_batch_end")
    done = run_on(1, lambda: run_cli(["fit", "--config=digits.yaml", *SHORT], send, FailInTeardown()))
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == "Stopped by SIGTERM."


class Block(Callback):
    """Block at the end of an interrupted run, like a library that waits for a lock."""

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        threading.Event().wait()


def test_a_stopped_command_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsoftmax_lightning.callbacks.exit_on_signals.EXIT_SECONDS", 1)
    send = Send(signal.SIGTERM, "on_test_batch_end")
    done = run_on(1, lambda: run_cli(["fit", "--config=digits.yaml", *SHORT], send, Block()))
    assert done.returncode == 143


def test_running_workers_are_killed_when_a_command_is_stopped() -> None:
    def stopped() -> None:
        inherited = multiprocessing.active_children()  # children of the test process
        context = multiprocessing.get_context("fork")
        others = context.Process(target=lambda: time.sleep(100), daemon=True)
        others.start()
        try:
            with errors_without_traceback():
                worker = context.Process(target=lambda: [ignore_signals(), time.sleep(100)], daemon=True)
                worker.start()
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            assert set(multiprocessing.active_children()) == {*inherited, others}
            others.kill()

    done = run_on(1, stopped)
    assert done.returncode == 143, done.stderr


def test_a_start_that_fails_leaves_no_folder_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config=digits.yaml", *SHORT]
    assert "train_size: must be at most" in fails(capsys, *fit, "--data.train_size=100000")
    assert not list(Path("runs/digits").iterdir())
    main(fit)
    assert [folder.name for folder in Path("runs/digits").iterdir()] == ["m2-s0"]
    Path("runs/digits/mine").mkdir()
    Path("runs/digits/mine/notes.txt").touch()
    fails(capsys, *fit, "--data.train_size=100000", "--trainer.logger.version=mine")
    assert Path("runs/digits/mine/notes.txt").is_file()


def test_resume_rejects_another_margin_and_a_shorter_run(capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config=digits.yaml", *SHORT]
    main([*fit, "--trainer.max_epochs=3"])
    before = Path("runs/digits/m2-s0/config.yaml").read_text()
    resume = [*fit, "--trainer.max_epochs=3", "--ckpt_path=last"]
    assert "model.margin: must be 2 to resume the run in runs/digits/m2-s0, got 3" in fails(
        capsys, *resume, "--model.margin=3"
    )
    printed = fails(capsys, *resume, "--trainer.max_epochs=1")
    assert "trainer.max_epochs: must be at least the 2 epochs of the checkpoint, got 1." in printed
    assert Path("runs/digits/m2-s0/config.yaml").read_text() == before
