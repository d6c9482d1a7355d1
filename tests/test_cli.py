"""Command line, from the perspective of a user."""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from lightning import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lsoftmax_lightning
from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.callbacks import BestCheckpoint
from lsoftmax_lightning.cli import CONFIGS, main
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.lightning_cli import LSoftmaxCLI
from lsoftmax_lightning.schedules import AccuracyFeedback
from lsoftmax_lightning.settings import checkpoint_mode

from .helpers.command_line import FIRST_IS_BEST, QUIET, SHORT, fails, small_data
from .helpers.forked import run_on
from .helpers.formats import write_folder, write_lfw

# few classes, augmented images, and pairs of faces
ON_TWO_DEVICES = ("digits.yaml", "cifar10plus.yaml")


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore:.*non-finite embeddings")  # a fast_dev_run has one batch
def test_every_shipped_config_runs(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_data(config.name, tmp_path / "small", monkeypatch)
    cli = main(["fit", "--config", config.name, "--trainer.fast_dev_run=true", *QUIET, *data])
    assert cli is not None
    assert cli.trainer.global_step == 1
    assert {path.name for path in Path().iterdir()} <= {"small"}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path, marks=() if path.name in ON_TWO_DEVICES else pytest.mark.slow)
        for path in sorted(CONFIGS.glob("*.yaml"))
    ],
    ids=lambda path: path.name,
)
def test_every_shipped_config_runs_on_two_devices(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.fast_dev_run=true"]
    data = small_data(config.name, tmp_path / "small", monkeypatch)
    done = run_on(2, partial(main, ["fit", "--config", config.name, *QUIET, *devices, *data]))
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert "accuracy" in done.stdout


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_complete(config: Path) -> None:
    text = config.read_text()
    assert text.startswith("# ")
    for part in ("# Reproduces:", "# Expected:", "# Takes:", f"fit --config {config.name}"):
        assert part in text
    assert not re.search("TODO|EXPECTED", text)
    keys = yaml.safe_load(text)
    assert {"model", "data", "trainer"} <= set(keys)
    assert "num_classes" not in keys["model"]["init_args"]  # the data define it


def test_test_and_predict_find_the_folder_of_fit() -> None:
    cli = main(["fit", "--config", "digits", *SHORT, "--trainer.max_epochs=3", *FIRST_IS_BEST])
    assert cli is not None
    run = Path("runs/digits/m2-s0")
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "results.json", "hparams.yaml", "checkpoints"} <= names
    assert any(name.startswith("events") for name in names)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "index.json"}
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 9
    results = json.loads((run / "results.json").read_text())
    angles = {f"{kind}_angle_{what}" for kind in ("weight", "centre") for what in ("mean", "nearest", "min")}
    metrics = {"acc", "loss", "angle", "feature_norm", "segment_0", "segment_1"} | angles
    chosen_by = results.pop("val/centre_angle_nearest")
    assert set(results) == {f"test/{name}" for name in metrics}
    scores = [
        state["best_model_score"].item()
        for name, state in torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"].items()
        if "val/centre_angle_nearest" in name
    ]
    assert scores == pytest.approx([chosen_by])

    best = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    assert torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] < 9
    main(["test", "--config", str(run / "config.yaml"), best])
    assert json.loads(Path("runs/digits/m2-s0/test/results.json").read_text()) == pytest.approx(results)
    assert not Path("runs/digits/m2-s0/test/config.yaml").exists()

    predicted = main(["predict", "--config", str(run / "config.yaml"), best])
    assert predicted is not None
    rows = Path("runs/digits/m2-s0/predict/predictions.csv").read_text().splitlines()
    assert rows[0] == "index,label,prediction,probability,angle"
    truth = predicted.datamodule.test_data.targets.tolist()
    right = [int(row.split(",")[2]) == label for row, label in zip(rows[1:], truth, strict=True)]
    assert sum(right) / len(right) == pytest.approx(results["test/acc"])

    assert [path.name for path in Path("runs/digits").iterdir()] == ["m2-s0"]

    loaded = ClassificationModule.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert loaded.head.margin == 2

    shutil.copy(run / "checkpoints/best.ckpt", "elsewhere.ckpt")
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path=elsewhere.ckpt"])
    assert {path.name for path in Path("runs/digits").iterdir()} == {"m2-s0", "test"}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("best", ["checkpoints", "best"])
def test_a_run_without_a_logger_does_not_overwrite_another(best: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "--config=digits", *SHORT, "--trainer.logger=false"]
    main([*command, f"--checkpoint.dirpath={best}"])
    before = {path: path.read_bytes() for path in Path().rglob("*.ckpt")}
    assert set(before) == {Path(best, "best.ckpt"), Path("checkpoints/last.ckpt")}
    for folder in (best, "other"):
        message = fails(capsys, *command, f"--checkpoint.dirpath={folder}")
        assert "contains another run, got " in message
    assert {path: path.read_bytes() for path in Path().rglob("*.ckpt")} == before
    resume = [f"--checkpoint.dirpath={best}", "--ckpt_path=checkpoints/last.ckpt", "--trainer.max_epochs=2"]
    resumed = main([*command, *resume])
    assert resumed is not None
    assert resumed.trainer.current_epoch == 2


@pytest.mark.filterwarnings("ignore:There is no best checkpoint")
def test_a_run_without_a_logger_does_not_overwrite_another_in_a_remote_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["fit", "--config=digits", *SHORT, "--trainer.logger=false", "--trainer.default_root_dir=memory://runs"]
    main(command)
    assert "memory://runs/checkpoints contains another run" in fails(capsys, *command)


@pytest.mark.parametrize(("version", "name"), [("named", "named"), ("null", "version_0")])
def test_test_does_not_write_into_a_run_with_a_csv_logger(version: str, name: str) -> None:
    loggers = f"[{{class_path: CSVLogger, init_args: {{save_dir: logs, version: {version}}}}}]"
    main(["fit", "--config=digits", *SHORT, f"--trainer.logger={loggers}"])
    run = Path("logs/digits", name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run / "metrics.csv" in before
    for _ in range(2):
        main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints/last.ckpt'}"])
        assert {path: path.read_bytes() for path in before} == before
        assert (run / "test/results.json").is_file()
        assert [folder.name for folder in run.parent.iterdir()] == [name]


@pytest.mark.parametrize("version", ["named", ""])
def test_test_does_not_write_into_a_run_with_a_version(version: str) -> None:
    name = [f"--trainer.logger.version={version}", "--trainer.logger.name=name"]
    main(["fit", "--config=digits", *SHORT, *name])
    run = Path("runs/name", version)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shutil.copy(run / "checkpoints/best.ckpt", "elsewhere.ckpt")
    for checkpoint in (str(run / "checkpoints/last.ckpt"), "elsewhere.ckpt"):
        main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}"])
        assert {path: path.read_bytes() for path in before} == before
    assert (run / "test/results.json").is_file()
    assert set(run.glob("events*")) <= before.keys()
    main(["test", f"--config={run / 'config.yaml'}", "--ckpt_path=elsewhere.ckpt", "--trainer.logger.version=other"])
    assert Path("runs/name/other/results.json").is_file()


ZEROES_WEIGHTS = """
import torch
from lightning import Callback
class ZeroWeights(Callback):
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        for weight in pl_module.parameters():
            torch.nn.init.zeros_(weight)
"""


@pytest.mark.parametrize(
    "callback",
    [
        ["lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay=0.9"],
        ["lightning.pytorch.callbacks.WeightAveraging"],
        ["zeroes_weights.ZeroWeights"],
    ],
    ids=lambda callback: callback[0].rpartition(".")[2],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:You're using the WeightAveraging")
def test_fit_tests_the_weights_of_the_best_checkpoint(callback: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("zeroes_weights.py").write_text(ZEROES_WEIGHTS)
    monkeypatch.syspath_prepend("")
    name, *settings = callback
    main(
        ["fit", "--config", "digits.yaml", *SHORT, "--trainer.max_epochs=3", f"--trainer.callbacks+={name}", *settings]
    )
    results = json.loads(Path("runs/digits/m2-s0/results.json").read_text())
    del results["val/loss"]
    main(["test", "--config", "digits.yaml", *QUIET, "--model.margin=2", "--ckpt_path=best"])
    assert json.loads(Path("runs/digits/m2-s0/test/results.json").read_text()) == pytest.approx(results)


@pytest.mark.parametrize(("seed", "name"), [("3", "m2-s3"), ("false", "m2")])
def test_a_run_is_named_after_its_margin_and_seed(seed: str, name: str) -> None:
    main(["fit", "--config", "digits.yaml", *SHORT, f"--seed_everything={seed}", "--trainer.limit_test_batches=1"])
    assert [folder.name for folder in Path("runs/digits").iterdir()] == [name]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # Lightning warns about a folder that is used twice
def test_two_runs_never_share_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config", "digits.yaml", *SHORT]
    for _ in range(2):
        main(fit)
    assert Path("runs/digits/m2-s0-2/results.json").is_file()
    named = [*fit, "--trainer.logger.version=mine"]
    main(named)
    results = Path("runs/digits/mine/results.json").read_text()
    assert "runs/digits/mine/checkpoints contains another run" in fails(capsys, *named)
    other = "--ckpt_path=runs/digits/m2-s0/checkpoints/last.ckpt"
    assert "runs/digits/mine/checkpoints contains another run" in fails(capsys, *named, other)
    assert Path("runs/digits/mine/results.json").read_text() == results
    main([*named, "--ckpt_path=last"])
    main([*fit, "--checkpoint.dirpath=elsewhere"])
    assert "elsewhere contains another run" in fails(capsys, *fit, "--checkpoint.dirpath=elsewhere")


def test_checkpoints_of_another_run_are_neither_tested_nor_replaced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = ["fit", "--config", "digits.yaml", *SHORT]
    main(fit)
    main([*fit, "--checkpoint.dirpath=best", "--seed_everything=5"])
    before = Path("best/best.ckpt").read_bytes()
    last = "--ckpt_path=runs/digits/m2-s0/checkpoints/last.ckpt"
    assert "best contains another run" in fails(capsys, *fit, last, "--checkpoint.dirpath=best")
    assert Path("best/best.ckpt").read_bytes() == before
    Path("moved").mkdir()
    for folder in ("runs", "best"):
        shutil.move(folder, "moved")
    monkeypatch.chdir("moved")
    own = "--ckpt_path=runs/digits/m2-s5/checkpoints/last.ckpt"
    best = f"--checkpoint.dirpath={Path('best').absolute()}"
    main([*fit, own, best, "--seed_everything=5", "--trainer.max_epochs=2"])


@pytest.mark.parametrize("folder", ["runs/digits/mine", "runs/digits/mine/best"])
def test_checkpoints_may_be_in_the_folder_of_the_run(folder: str) -> None:
    fit = ["fit", "--config", "digits.yaml", *SHORT, "--trainer.logger.version=mine"]
    main([*fit, f"--checkpoint.dirpath={folder}"])
    assert Path(folder, "best.ckpt").is_file()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_runs_may_share_the_folder_of_another_checkpoint_callback() -> None:
    callback = '{class_path: ModelCheckpoint, init_args: {dirpath: all, filename: "%s"}}'
    for seed in (0, 1):
        name = f"--trainer.callbacks+={callback % seed}"
        main(["fit", "--config", "digits.yaml", *SHORT, f"--seed_everything={seed}", name])
    assert {path.name for path in Path("all").iterdir()} == {"0.ckpt", "1.ckpt"}


@pytest.mark.parametrize(("folder", "name"), [("runs/digits/mine", "results.json"), ("best", "best.ckpt")])
def test_a_run_that_ended_while_another_waited_keeps_its_folder(
    folder: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = FileLock.acquire

    def wait(lock: FileLock, *args: Any, **kwargs: Any) -> Any:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_text("another run")
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", wait)
    fit = ["fit", "--config", "digits.yaml", *SHORT, "--trainer.logger.version=mine", "--checkpoint.dirpath=best"]
    assert f"{folder} contains another run" in fails(capsys, *fit)
    assert Path(folder, name).read_text() == "another run"


@pytest.mark.parametrize("name", ["plain", "with [brackets] *"])
def test_special_characters_of_a_folder_do_not_hide_a_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config=digits", *SHORT, "--trainer.logger=false", f"--checkpoint.dirpath={name}"]
    main([*fit, f"--trainer.default_root_dir={name}"])
    assert "contains another run, got best.ckpt" in fails(capsys, *fit)


def test_a_command_without_a_run_does_not_write_into_a_run_of_its_name() -> None:
    main(["fit", "--config=digits", *SHORT, "--trainer.logger.version=test"])
    results = Path("runs/digits/test/results.json").read_text()
    with pytest.warns(UserWarning, match="RANDOM"):
        main(["test", "--config=digits", *QUIET])
    assert Path("runs/digits/test/results.json").read_text() == results
    assert Path("runs/digits/test-2/results.json").is_file()


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.filterwarnings("ignore:No --ckpt_path is set")
def test_results_are_written_before_they_are_printed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*args: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("lsoftmax_lightning.lightning_cli.print_metrics", closed)
    with pytest.raises(BrokenPipeError):
        LSoftmaxCLI([command, "--config=digits.yaml", *SHORT])
    (results,) = Path("runs/digits").glob("*/results.json")
    assert "test/acc" in json.loads(results.read_text())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--model.optimizer=AdamW", "model.optimizer: must be torch.optim.SGD to resume the run in runs/digits/m2-s0"),
        ("--model.lr_scheduler=null", "model.lr_scheduler: must be "),
    ],
)
def test_resuming_by_a_path_checks_optimizer_and_scheduler(
    setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", "--config", "digits.yaml", *SHORT]
    main(fit)
    last = "--ckpt_path=runs/digits/m2-s0/checkpoints/last.ckpt"
    assert message in fails(capsys, *fit, last, setting)
    with pytest.warns(UserWarning, match="The checkpoint determines the settings of optimizer"):
        main([*fit, last, "--model.optimizer.lr=0.5", "--trainer.max_epochs=2"])


def test_the_best_checkpoint_cannot_have_the_name_of_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "fit", "--config", "digits.yaml", *SHORT, "--checkpoint.filename=last")
    assert "checkpoint.filename: must not be last" in message


def test_a_version_with_leading_zeros_is_continued_in_its_folder() -> None:
    fit = ["fit", "--config", "digits.yaml", *SHORT]
    main([*fit, "--trainer.logger.version=version_007"])
    main([*fit, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert [folder.name for folder in Path("runs/digits").iterdir()] == ["version_007"]


def test_a_resumed_run_keeps_unfinished_predictions() -> None:
    fit = ["fit", "--config", "digits.yaml", *SHORT]
    main(fit)
    parts = [Path("runs/digits/m2-s0", folder, ".out.part") for folder in ("checkpoints", "predict")]
    parts[1].parent.mkdir()
    for part in parts:
        part.touch()
    main([*fit, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert [part.exists() for part in parts] == [False, True]


def test_a_resumed_trial_writes_no_file() -> None:
    fit = ["fit", "--config", "digits.yaml", *SHORT]
    main(fit)
    before = set(Path().rglob("*"))
    main([*fit, "--ckpt_path=last", "--trainer.fast_dev_run=true"])
    assert set(Path().rglob("*")) == before


def test_a_folder_is_locked_while_its_run_is_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lsoftmax_lightning.run_folder.LOCK_SECONDS", 0)
    folder = Path("runs/digits/m2-s0")
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        printed = fails(capsys, "fit", "--config", "digits.yaml", *SHORT, "--trainer.logger.version=m2-s0")
    assert f"trainer.logger.version: must not be that of a run in another process, got {folder}" in printed
    assert not (folder / "config.yaml").exists()


USERS_MODULE = """
from torch.optim import SGD
from lsoftmax_lightning import ClassificationModule
class Module(ClassificationModule):
    def training_step(self, batch, batch_idx):
        raise IndexError("of the user")
"""


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        (["--checkpoint.monitor=val/acc"], "max"),
        (["--checkpoint.monitor=val/loss"], "min"),
        (["--checkpoint.monitor=val/margin_loss", "--checkpoint.mode=min"], "min"),
        (["--checkpoint.monitor=val/feature_norm", "--checkpoint.mode=max"], "max"),
        (["--checkpoint.monitor=null"], "min"),
    ],
)
def test_the_mode_follows_the_metric_of_the_best_checkpoint(
    settings: list[str], mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    cli = main(["fit", "--config", "digits.yaml", *SHORT, "--trainer.max_epochs=2", *settings])
    assert cli is not None
    (best,) = (c for c in cli.trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint))
    assert best.mode == mode
    assert yaml.safe_load(Path("runs/digits/m2-s0/config.yaml").read_text())["checkpoint"]["mode"] == mode
    message = {"max": "Best checkpoint: highest", "min": "Best checkpoint: lowest"}[mode]
    assert (f"{message} {best.monitor}" in caplog.messages) == (best.monitor is not None)


def test_metrics_that_cannot_be_monitored_have_no_mode() -> None:
    with pytest.raises(InputError, match=r"checkpoint\.mode: is unknown for train/cross_entropy, got auto"):
        checkpoint_mode("train/cross_entropy", "auto")


@pytest.mark.parametrize("config", ["digits.yaml", "mnist.yaml"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--checkpoint.monitor=val/acc", "--checkpoint.mode=min"], "must be max for val/acc, got min"),
        (["--checkpoint.monitor=val/loss", "--checkpoint.mode=max"], "must be min for val/loss, got max"),
        (
            ["--checkpoint.monitor=val/feature_norm"],
            "checkpoint.mode: is unknown for val/feature_norm, got auto; set min if",
        ),
    ],
)
def test_wrong_or_missing_checkpoint_mode_is_rejected(
    settings: list[str], message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["fit", "--config", config], ["compare", "--config", config, "--margins", "1"]):
        assert message in fails(capsys, *command, *settings)


def test_only_errors_in_the_users_code_show_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = ["fit", "--config", "digits.yaml", *SHORT, "--model.optimizer=torch.optim.SparseAdam"]
    printed = fails(capsys, *library)
    assert "error: RuntimeError: SparseAdam does not support dense gradients" in printed
    assert "(LSOFTMAX_LIGHTNING_DEBUG=1 prints the traceback.)" in printed
    Path("users_module.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(".")
    with pytest.raises(IndexError, match="of the user"):
        main(["fit", "--config", "digits.yaml", *SHORT, "--model=users_module.Module"])
    monkeypatch.setenv("LSOFTMAX_LIGHTNING_DEBUG", "1")
    with pytest.raises(RuntimeError, match="SparseAdam"):
        main(library)
    capsys.readouterr()
    with pytest.raises(Exception, match="margin: must be"):
        main(["fit", "--config", "digits.yaml", "--model.margin=0"])
    assert "error: margin: must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("purge_step=true", "trainer.logger.purge_step: must be a step below 2^63, or null, got True; correct it."),
        ("purge_step=99999999999999999999", "trainer.logger.purge_step: must be"),
        ("filename_suffix=null", "trainer.logger.filename_suffix: must be a string, got None; correct it."),
        ("flush_secs=abc", "trainer.logger.flush_secs: must be a number of seconds, got 'abc'; correct it."),
        ("max_queue=[1]", "trainer.logger.max_queue: must be an integer, got [1]; correct it."),
    ],
)
def test_settings_of_the_event_writer_are_checked(
    setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "fit", "--config", "digits.yaml", *SHORT, f"--trainer.logger.{setting}")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("finder", "num_images", "batch_size"),
    [
        (["BatchSizeFinder"], 160, 160),
        (["BatchSizeFinder", "--trainer.callbacks.mode=binsearch"], 160, 152),  # 5 % fewer
        (["BatchSizeFinder", "--trainer.callbacks.init_val=5000"], 160, 160),
        (["BatchSizeFinder", "--trainer.callbacks.max_trials=3"], 160, 8),
        (["LearningRateFinder"], 1280, 64),  # with fewer steps it finds none
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:The batch size is lowered")
def test_tuners_of_lightning_run_before_the_training(finder: list[str], num_images: int, batch_size: int) -> None:
    seen = []

    class Record(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            (config,) = trainer.lr_scheduler_configs
            seen.append((len(batch[0]), trainer.optimizers[0].param_groups[0]["lr"], config.scheduler.total_steps))

    name, *settings = finder
    config = ["--config=digits.yaml", f"--data.train_size={num_images}", *QUIET]
    args = ["fit", *config, "--trainer.max_epochs=3", f"--trainer.callbacks+={name}", *settings]
    cli = LSoftmaxCLI(args, callbacks=[Record()])
    steps = 3 * (num_images // batch_size)
    learning_rate = cli.model.learning_rate if name == "LearningRateFinder" else 0.05
    assert seen[0] == (batch_size, learning_rate, steps)
    assert seen[-1] == (batch_size, pytest.approx(learning_rate / 100), steps)
    assert len(seen) == steps
    assert not list(Path().glob(".*"))
    results = json.loads(Path("runs/digits/m4-s0/results.json").read_text())
    del results["val/loss"]
    main(["test", *config, "--ckpt_path=best"])
    assert json.loads(Path("runs/digits/m4-s0/test/results.json").read_text()) == pytest.approx(results, rel=1e-3)


ALIASES = "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))])


@pytest.mark.parametrize("text", [f"{ALIASES}\nmodel: *a39\n", "model: &a\n  class_path: *a\n"], ids=["bomb", "loop"])
@pytest.mark.parametrize("argument", ["--config=bad.yaml", "--config=digits.yaml --model=bad.yaml"])
def test_aliases_of_a_config_are_bounded(argument: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(text)
    assert "at most 100,000 values with aliases expanded" in fails(capsys, "fit", *argument.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed_everything: 1\nseed_everything: 2\n", "seed_everything: must be set once, got lines 1 and 2"),
        ("trainer:\n  logger: {name: a, name: b}\n", "name: must be set once, got lines 2 and 2"),
        ("trainer:\n  callbacks:\n  - {class_path: a, class_path: b}\n", "class_path: must be set once"),
    ],
)
def test_duplicate_keys_are_rejected(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("twice.yaml").write_text(text)
    assert message in fails(capsys, "fit", "--config=digits.yaml", "--config=twice.yaml")


def test_merged_keys_can_be_overridden() -> None:
    Path("merged.yaml").write_text("trainer:\n  <<: {max_epochs: 1, max_steps: 7}\n  <<: {}\n  max_epochs: 2\n")
    cli = main(["fit", "--config=digits.yaml", "--config=merged.yaml", *QUIET, "--trainer.limit_train_batches=2"])
    assert cli is not None
    assert (cli.trainer.max_epochs, cli.trainer.max_steps) == (2, 7)


@pytest.mark.slow
def test_a_port_in_use_ends_all_ranks_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        devices = ["--trainer.devices=2", "--trainer.strategy=ddp"]
        command = [sys.executable, "-m", "lsoftmax_lightning", "fit", "--config=digits.yaml", *SHORT, *devices]
        done = subprocess.run(command, env=os.environ | port, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "error: the port is in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_model_arguments_are_linked_to_the_data() -> None:
    cli = main(["fit", "--config", "digits.yaml", "--trainer.fast_dev_run=true", *QUIET])
    assert cli is not None
    assert cli.model.hparams["num_classes"] == 10
    assert cli.model.hparams["image_shape"] == (1, 8, 8)


NARROW = """
from lsoftmax_lightning import ClassificationModule, VerificationModule

class Narrow(ClassificationModule):
    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], half: int = 1) -> None:
        super().__init__(num_classes, "digits", 2 * half, image_shape, label_smoothing=0.1)

class Fixed(ClassificationModule):
    def __init__(self) -> None:
        super().__init__(10, "digits", 2, (1, 8, 8), label_smoothing=0.1)

class Faces(VerificationModule):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, "digits", 4, True, margin=2, image_shape=(3, 8, 8), label_smoothing=0.1)
"""


@pytest.mark.parametrize("name", ["Narrow", "Fixed", "Faces"])
def test_subclass_can_fix_arguments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("narrow_module.py").write_text(NARROW)
    monkeypatch.syspath_prepend("")
    config, data = "digits.yaml", []
    if name == "Faces":
        config, data = "lfw_fold.yaml", ["--data.image_size=8"]
        data += small_data(config, tmp_path / "small", monkeypatch)
    model = f"--model=narrow_module.{name}"
    cli = main(["fit", "--config", config, *QUIET, *data, model, "--trainer.max_epochs=1"])
    assert cli is not None
    assert (cli.model.head.margin, cli.model.criterion.label_smoothing) == (2, 0.1)
    cli.trainer.save_checkpoint("kept.ckpt")
    loaded = type(cli.model).load_from_checkpoint("kept.ckpt")
    assert torch.equal(loaded.head.weight, cli.model.head.weight)
    assert (loaded.head.margin, loaded.criterion.label_smoothing) == (2, 0.1)
    if name == "Faces":
        assert (loaded.pca_components, loaded.mirror) == (4, True)


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [("resnet18", "ResNet"), ("{class_path: bare_net.Net, init_args: {width: 5}}", "Net")],
)
def test_a_backbone_is_a_name_or_a_class(backbone: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bare_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width: int):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, width))\n"
        "        self.num_features = width\n"
    )
    monkeypatch.syspath_prepend("")
    cli = main(["fit", "--config", "digits.yaml", "--trainer.fast_dev_run=true", *QUIET, "--model.backbone", backbone])
    assert cli is not None
    assert type(cli.model.backbone).__name__ == kind
    assert cli.model.head.in_features == (5 if kind == "Net" else 512)


def test_a_trained_module_pickles_without_the_parser() -> None:
    cli = main(["fit", "--config", "digits.yaml", *SHORT])
    assert cli is not None
    torch.save(cli.model, "model.pt")
    assert b"jsonargparse" not in Path("model.pt").read_bytes()
    loaded = torch.load("model.pt", weights_only=False)
    assert loaded.configure_optimizers()["optimizer"].defaults["lr"] == 0.05
    pickle.dumps(cli.datamodule)  # references the Trainer and its callbacks


RESUMED = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the resumed run has a new folder


@RESUMED
def test_resume_continues_the_training() -> None:
    main(["fit", "--config", "digits.yaml", *SHORT])
    last = "--ckpt_path=runs/digits/m2-s0/checkpoints/last.ckpt"
    cli = main(["fit", "--config", "digits.yaml", *SHORT, "--trainer.max_epochs=2", last])
    assert cli is not None
    assert cli.trainer.global_step == 6
    assert cli.model.lambda_schedule == AccuracyFeedback()  # from the config, because checkpoints do not store it
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0005)


@RESUMED
@pytest.mark.filterwarnings("ignore:model.margin. is 2 in")
def test_given_settings_override_those_of_a_checkpoint() -> None:
    main(["fit", "--config", "digits.yaml", *SHORT])
    last = "--ckpt_path=runs/digits/m2-s0/checkpoints/last.ckpt"
    cli = main(["fit", "--config", "digits.yaml", *SHORT, "--trainer.max_epochs=2", "--model.margin=3", last])
    assert cli is not None
    assert cli.model.head.margin == 3


def test_checkpoint_of_another_network_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "digits.yaml", *SHORT])
    test = ["test", "--config", "digits.yaml", *QUIET, "--ckpt_path"]
    best = "runs/digits/m2-s0/checkpoints/best.ckpt"
    printed = fails(capsys, *test, best, "--model.backbone_args={num_features: 32}")
    assert "is from another network: backbone.layers." in printed
    assert "must be (32, 256), got (64, 256)" in printed
    torch.save({"weight": torch.zeros(1)}, "bare.ckpt")
    assert "contains only weights; use --model.warm_start bare.ckpt" in fails(capsys, *test, "bare.ckpt")
    torch.save(Path("unsafe"), "unsafe.ckpt")
    message = fails(capsys, *test, "unsafe.ckpt")
    assert re.search(
        r"loading it would run code \(pathlib(\._local)?\.PosixPath\)", message
    )  # the second name is that of Python 3.13
    assert "runs does not exist, or is not a file" in fails(capsys, *test, "runs")


def test_another_margin_than_that_of_the_checkpoint_warns(recwarn: pytest.WarningsRecorder) -> None:
    config = ["--config=digits.yaml", *SHORT]
    main(["fit", *config])
    checkpoint = "--ckpt_path=runs/digits/m2-s0/checkpoints/best.ckpt"
    for command in (["test", checkpoint], ["validate", "--ckpt_path=best"], ["fit", checkpoint]):
        main([*command, *config])
        with pytest.warns(
            UserWarning, match=r"model.margin: is 2 in runs/\S+best.ckpt, got 3; .* Set --model.margin 2"
        ):
            main([*command, *config, "--model.margin=3"])
    recwarn.clear()
    main(["predict", "--ckpt_path=best", *config, "--model.margin=3"])
    main(["fit", "--ckpt_path=last", *config, "--model.margin=3"])  # it reports all changed settings
    assert not [warning for warning in recwarn if "model.margin" in str(warning.message)]


def test_without_a_logger_no_user_file_is_overwritten() -> None:
    config = Path("config.yaml")
    config.write_text((CONFIGS / "digits.yaml").read_text())
    before = config.read_text()
    main(["fit", "--config", "config.yaml", *SHORT, "--trainer.logger=false"])
    assert config.read_text() == before
    assert not Path("results.json").exists()


def test_dashboard_is_added_with_its_settings() -> None:
    drawing = ("--dashboard.every_n_epochs=1", "--dashboard.save=true", "--dashboard.max_samples=50")
    cli = main(["fit", "--config", "digits", *SHORT, *drawing, "--trainer.log_every_n_steps=1"])
    assert cli is not None
    run = Path("runs/digits/m2-s0")
    events = EventAccumulator(str(run)).Reload().Tags()
    assert {"val/features", "val/confusion", "test/features", "test/confusion"} <= set(events["images"])
    assert {"train/angle", "val/angle", "test/angle", "lr", "effective_margin"} <= set(events["scalars"])
    assert len((run / "dashboard" / "test_features.csv").read_text().splitlines()) == 1 + 50


def test_checkpoints_can_be_switched_off() -> None:
    main(["fit", "--config", "digits.yaml", *SHORT, "--trainer.enable_checkpointing=false"])
    assert Path("runs/digits/m2-s0/results.json").is_file()
    assert not list(Path().rglob("*.ckpt"))


def test_fit_without_a_best_checkpoint_warns() -> None:
    with pytest.warns(UserWarning, match="There is no best checkpoint; testing the model with its last weights"):
        main(["fit", "--config", "digits.yaml", *SHORT, "--checkpoint.every_n_epochs=2"])


def test_data_without_num_classes_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("bare_data.py").write_text("from lightning import LightningDataModule\nclass Bare(LightningDataModule): ...\n")
    monkeypatch.syspath_prepend("")
    printed = fails(capsys, "fit", "--config", "digits.yaml", *QUIET, "--data", "bare_data.Bare")
    assert "image_shape" in printed
    assert "the datamodule must have image_shape" in printed


def test_a_config_in_the_working_directory_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "--copy", "digits.yaml"])
    config = Path("digits.yaml")
    config.write_text(config.read_text() + "  logger: {init_args: {name: mine}}\n")
    main(["fit", "--config", "digits.yaml", *SHORT])
    assert Path("runs/mine").is_dir()
    assert "already exists in" in fails(capsys, "configs", "--copy", "digits")


def test_configs_command_lists_each_config_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "cifar10.yaml",
        "cifar100.yaml",
        "cifar10plus.yaml",
        "digits.yaml",
        "fashion_mnist.yaml",
        "folder.yaml",
        "lfw.yaml",
        "lfw_fold.yaml",
        "mnist.yaml",
        "mnist_1000.yaml",
        "mnist_2d.yaml",
    ]
    assert all(len(line.split()) > 4 for line in lines)


def test_version_and_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"lsoftmax_lightning {lsoftmax_lightning.__version__}\n"
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", "digits.yaml", "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["margin"] == 4
    assert printed["checkpoint"]["monitor"] == "val/loss"


@pytest.mark.filterwarnings("ignore:No --ckpt_path")
def test_faces_are_predicted_as_embeddings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_lfw(tmp_path / "lfw", folds=10)
    args = ("--config", "lfw_fold.yaml", f"--data.root={tmp_path / 'lfw'}", "--data.num_workers=0", *QUIET[:3])
    message = (
        "predictions.embeddings: must be true for VerificationModule, which predicts only embeddings, got false; set"
    )
    assert message in fails(capsys, "predict", *args)
    main(["predict", *args, "--predictions.output=faces.csv", "--predictions.embeddings=true"])
    _, *paths = Path("faces.csv").read_text().splitlines()
    assert all(Path(path).is_file() for path in paths)
    assert np.load("faces.npy").shape == (len(paths), 128)


def test_data_class_of_a_config_can_be_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path)
    cli = main(
        [
            "fit",
            "--config",
            "cifar10plus.yaml",
            "--trainer.fast_dev_run=true",
            *QUIET,
            "--data",
            "ImageFolderDataModule",
            f"--data.root={tmp_path}",
            "--data.image_size=16",
            "--data.batch_size=8",
            "--data.num_workers=0",
        ]
    )
    assert cli is not None
    assert cli.datamodule.augment.padding == 4  # settings of both classes are kept
    assert cli.model.head.num_classes == 2


def test_testing_random_weights_warns() -> None:
    with pytest.warns(UserWarning, match="RANDOM weights"):
        main(["test", "--config", "digits.yaml", *QUIET])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--config", "nope.yaml"], ["no config 'nope.yaml'", "digits.yaml, fashion_mnist.yaml, folder.yaml"]),
        (["configs", "--copy", "nope"], ["no config 'nope'", "digits.yaml"]),
        (["fit", "--config", "digits.yaml", "--model", "Nope"], ["Nope"]),
        (["fit", "--config", "digits.yaml", "--model.margni", "2"], ["margni"]),
        (["fit", "--config", "digits.yaml", "--trainer.epochs", "2"], ["trainer.epochs"]),
        (["fit", "--config", "digits.yaml", "--model.margin", "0"], ["integer from 1", "got 0"]),
        (["fit", "--config", "digits.yaml", "--model.margin", "2.5"], ["2.5"]),
        (["fit", "--config", "digits.yaml", "--model.backbone", "resnet"], ["got 'resnet'"]),
        (["fit", "--config", "digits.yaml", "--model.lambda_schedule.gain", "-2"], ["gain", "got -2"]),
        (["fit", "--config", "digits.yaml", "--data.batch_size", "5000"], ["must be at most the 1293 samples"]),
        (["fit", "--config", "digits.yaml", "--data.val_size", "0"], ["val_size"]),
        (["fit", "--config", "digits.yaml", "--trainer.precision", "3"], ["precision"]),
        (["fit", "--config", "digits.yaml", "--trainer.strategy", "foo"], ["foo"]),
        (["fit", "--config", "digits.yaml", "--trainer.devices", "abc"], ["devices"]),
        (["fit", "--config", "digits.yaml", "--trainer.devices", "0"], ["0"]),
        (["fit", "--config", "digits.yaml", "--model.label_smoothing", "2"], ["label_smoothing"]),
        (
            ["fit", "--config", "digits.yaml", "--dashboard.every_n_epochs", "-1"],
            ["every_n_epochs", "or more, got -1"],
        ),
        (
            ["fit", "--config", "digits.yaml", "--dashboard.save=true", "--trainer.logger=false"],
            ["a logger has to name"],
        ),
        (
            ["fit", "--config", "digits.yaml", "--ckpt_path", "gone.ckpt"],
            ["gone.ckpt does not exist, or is not a file"],
        ),
        (
            ["fit", "--config", "digits.yaml", "--ckpt_path", "best"],
            ["of a run of fit", "best.ckpt"],
        ),
        (["fit", "--config", "digits.yaml", "--ckpt_path", "last", "--trainer.logger=false"], ["TensorBoardLogger"]),
        (["fit"], ["required", "model"]),
        (["fiet"], ["fiet", "fit"]),
        ([], ["fit"]),
    ],
)
def test_mistakes_get_one_clear_error(args: list[str], message: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = fails(capsys, *args, *(QUIET[:-1] if args[:1] == ["fit"] else []))
    for part in message:
        assert part in printed


def test_missing_data_without_network(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    printed = fails(capsys, "fit", "--config", "mnist.yaml", "--data.root", "gone", *QUIET)
    assert str(Path("gone").absolute()) in printed
    assert "copy them from another machine" in printed


def test_divergence_ends_in_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    printed = fails(capsys, "fit", "--config", "digits.yaml", *QUIET, "--model.optimizer.lr", "1e30")
    assert "lambda was" in printed
    assert "lower learning rate" in printed


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> torch.Tensor:
        raise ValueError("a bug")

    monkeypatch.setattr(ClassificationModule, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", "--config", "digits.yaml", *SHORT])


def test_the_command_ends_with_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = entry_points(group="console_scripts", name="lsoftmax_lightning")
    monkeypatch.setattr("lsoftmax_lightning.__main__.main", lambda: "anything")
    assert command.load()() is None  # any other result would be printed, with exit code 1
