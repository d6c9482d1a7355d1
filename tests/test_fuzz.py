"""Arbitrary settings either run or give a short error without a traceback.

FUZZ sets the number of examples of each kind and draws new ones; by default there are 20 fixed ones, 100 in slow tests.
"""

import contextlib
import copy
import functools
import io
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lsoftmax_lightning.cli import CONFIGS, main
from lsoftmax_lightning.compare.text import format_argument
from lsoftmax_lightning.config_files import flat
from lsoftmax_lightning.lightning_cli import LSoftmaxCLI

from .helpers.command_line import small_data

pytestmark = pytest.mark.filterwarnings("ignore")
# so that no other process or download is started
FIXED = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.fast_dev_run=true",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
FEW, MANY = (int(os.environ.get("FUZZ", default)) for default in ("20", "100"))
BASE: dict[str, Any] = yaml.safe_load((CONFIGS / "digits.yaml").read_text())
NUMBERS = [
    "model.margin",
    "model.label_smoothing",
    "model.optimizer.lr",
    "model.optimizer.momentum",
    "model.lr_scheduler.gamma",
    "model.optimizer.weight_decay",
    "model.optimizer.dampening",
    "model.backbone_args.num_features",
    *(f"model.lambda_schedule.{name}" for name in ("gain", "power", "lambda_min", "base", "accuracy_decay")),
    "data.batch_size",
    "data.val_size",
    "data.split_seed",
    "seed_everything",
    "data.train_size",
    "data.label_noise",
    "data.train_seed",
    *(f"dashboard.{name}" for name in ("every_n_epochs", "max_samples", "max_share")),
    *(f"checkpoint.{name}" for name in ("save_top_k", "every_n_epochs", "every_n_train_steps")),
    *(f"trainer.{name}" for name in ("max_epochs", "min_epochs", "max_steps", "min_steps", "limit_train_batches")),
    *(
        f"trainer.{name}"
        for name in ("limit_val_batches", "limit_test_batches", "overfit_batches", "val_check_interval")
    ),
    *(f"trainer.{name}" for name in ("check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps")),
    *(f"trainer.{name}" for name in ("accumulate_grad_batches", "gradient_clip_val", "precision")),
    "trainer.reload_dataloaders_every_n_epochs",
]
OTHERS = [
    *flat(BASE),
    "model",
    "data",
    "trainer",
    "checkpoint",
    "dashboard",
    "ckpt_path",
    "weights_only",
    "nope",
    "trainer.nope",
    *(
        f"model.{name}"
        for name in ("optimizer", "lr_scheduler", "lambda_schedule", "backbone_args", "warm_start", "nope")
    ),
    *(f"model.{name}" for name in ("num_classes", "image_shape", "lr_scheduler_interval", "optimizer.nesterov")),
    "data.class_path",
    "data.init_args",
    "data.nope",
    "data.root",
    "dashboard.save",
    *(f"checkpoint.{name}" for name in ("monitor", "mode", "filename", "dirpath", "train_time_interval", "save_last")),
    *(f"trainer.{name}" for name in ("max_time", "profiler", "plugins", "callbacks", "strategy", "default_root_dir")),
    *(f"trainer.{name}" for name in ("deterministic", "benchmark", "barebones", "detect_anomaly", "inference_mode")),
    *(f"trainer.{name}" for name in ("gradient_clip_algorithm", "sync_batchnorm", "enable_checkpointing", "logger")),
]
NUMBER = st.one_of(
    st.integers(-3, 5),
    st.sampled_from([7, 64, 500, 1000, -(10**9), 2**40, 0.0, 0.5, -0.5, 1.0, 1.5, 1e-12, 1e30]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), None]),
)
TEXTS = [
    "",
    "abc",
    "val/acc",
    "nope.Nope",
    "torch.nn.Linear",
    "digits",
    "torch.optim.Adam",
    "min",
    "last",
    "best",
    "none",
    "a: b: c",
    "[1, 2",
    "{",
    "../..",
    "/proc/nope",
    "ä" * 300,
    "1e400",
    "00:00:00:01",
    "1.0.0",
    "epoch",
]
PARTS = [
    {},
    [],
    {"class_path": "nope"},
    {"class_path": 3},
    {"init_args": {}},
    {"class_path": "RunFraction"},
    [{}],
    [1, "a"],
]
WORDS = [
    "--config",
    "--config=digits.yaml",
    "digits.yaml",
    "digits",
    "mnist.yaml",
    "--config=mnist_2d",
    "--help",
    "-h",
    "-c",
    "--model.margin=3",
    "--model.margin",
    "3",
    "--model",
    "VerificationModule",
    "ClassificationModule",
    "--data",
    "--",
    "DigitsDataModule",
    "CIFAR10DataModule",
    "--data.root=nowhere",
    "--ckpt_path=last",
    "--ckpt_path=best",
    "--ckpt_path",
    "--margins",
    "1",
    "x",
    "--seeds",
    "--sweep",
    "data.batch_size=1",
    "--jobs=0",
    "--report",
    "--folder=x",
    "--copy",
    "--print_config",
    "--trainer",
    "--trainer.help",
    "--model.help=ClassificationModule",
    "--version",
    "=",
    "-1",
    "",
]
ANYTHING = st.one_of(NUMBER, st.booleans(), st.sampled_from(TEXTS), st.sampled_from(PARTS), st.text(max_size=4))
MUTATION = st.one_of(
    st.tuples(st.sampled_from(NUMBERS), NUMBER),
    st.tuples(st.sampled_from(NUMBERS), NUMBER),
    st.tuples(st.sampled_from(OTHERS), ANYTHING),
)
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=3)
TEXT = (CONFIGS / "digits.yaml").read_text()


@st.composite
def arguments(draw: st.DrawFn) -> list[str]:
    """Settings of ``fit``, some of them wrong, as arguments."""
    words = [f"--{key}={format_argument(value)}" for key, value in draw(MUTATIONS)]
    return ["fit", "--config=digits.yaml", *words, *FIXED]


@st.composite
def configs(draw: st.DrawFn) -> list[str]:
    """Settings of ``fit``, some of them wrong, in a YAML file."""
    config = copy.deepcopy(BASE)
    for key, value in draw(MUTATIONS):
        part, *parts, last = key.split(".") if "." in key else (key, key)
        place = config.setdefault(part, {})
        for name in parts:
            if isinstance(place, dict):
                place = place.get("init_args", place).setdefault(name, {})
        if isinstance(place, dict):
            place.get("init_args", place)[last] = value
    Path("mutated.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    return ["fit", "--config=mutated.yaml", *FIXED]


@st.composite
def texts(draw: st.DrawFn) -> list[str]:
    """Damaged YAML file."""
    lines = TEXT.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        line = lines[at]
        cut = draw(st.integers(0, len(line)))
        lines[at] = draw(
            st.sampled_from(["", "  " + line, line.strip(), line[:cut], line[:cut] + "\t" + line[cut:], line * 2])
        )
        lines[at] += draw(st.sampled_from(["", "", ":", " x", "[", "'", " &a *b", "\x07", "\udcff"]))
    Path("mutated.yaml").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    return ["fit", "--config=mutated.yaml", *FIXED]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Words of commands, in any order."""
    words = draw(st.lists(st.sampled_from(WORDS), max_size=5))
    command = draw(st.sampled_from(["fit", "validate", "test", "predict", "configs", "compare", "", "--help", "fitt"]))
    return [command, *words, *(FIXED if command in LSoftmaxCLI.subcommands() else ["--trainer.fast_dev_run=true"])]


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def expired(*args: Any) -> None:
        pytest.fail(f"not finished after {seconds} s")  # not an Exception, which the command line might catch

    signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def assert_runs_or_reports(args: list[str]) -> None:
    message = io.StringIO()
    code: Any = 0
    try:
        with within(60), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(message):
            main(args)
    except SystemExit as error:
        code = error.code
    printed = message.getvalue()
    assert code == 0 or printed.strip()
    assert "Traceback" not in printed
    assert code == 0 or len(printed.splitlines()) <= 40, printed


WRONG_TYPES = [None, True, 3, -1, 0.5, 10**30, float("nan"), "abc", "", [1], [], {"a": 1}, [{}], {"class_path": "nope"}]
TINY = [
    "--model.backbone=digits",
    "--model.backbone_args=null",
    "--dashboard.every_n_epochs=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=1.0",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
]
# settings that start processes, wait, download or train for long
UNTRIED = {
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.max_time",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.limit_train_batches",
    "trainer.limit_val_batches",
    "trainer.limit_test_batches",
    "data.num_workers",
    "trainer.min_epochs",
    "trainer.min_steps",
    "trainer.accelerator",
    "config",
}


@pytest.mark.parametrize(
    "count", [max(2, FEW // 20), pytest.param(MANY // 20, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_wrong_types_of_every_setting_are_errors_without_traceback(
    config: Path, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", "--config", config.name, *TINY, *small_data(config.name, tmp_path / "small", monkeypatch)]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        main([*args, "--print_config"])
    settings = sorted(flat(yaml.safe_load(shown.getvalue())).keys() - UNTRIED)
    assert {"trainer.logger.purge_step", "checkpoint.monitor", "model.optimizer.differentiable"} <= set(settings)
    draw = random.Random(os.environ.get("FUZZ", config.name))
    for _ in range(count):
        setting, value = draw.choice(settings), draw.choice(WRONG_TYPES)
        assert_runs_or_reports([*args, f"--{setting}={format_argument(value)}"])


@pytest.fixture(autouse=True)
def _cheap(request: pytest.FixtureRequest) -> Iterator[None]:
    """Load the digits only once, and build only the parser of fit where no other command is called."""
    commands = LSoftmaxCLI.subcommands()
    if request.node.callspec.params.get("kind") is not command_lines:
        commands = {"fit": commands["fit"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.datasets.load_digits", functools.cache(load_digits))
        patch.setattr(LSoftmaxCLI, "subcommands", staticmethod(lambda: commands))
        logging.disable(logging.INFO)
        yield
        logging.disable(logging.NOTSET)


KINDS = pytest.mark.parametrize("kind", [arguments, configs, texts, command_lines])
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": "FUZZ" not in os.environ,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@KINDS
@settings(max_examples=FEW, **SETTINGS)
@given(data=st.data())
def test_fuzzed_cli_never_shows_a_traceback(
    kind: Callable[[], st.SearchStrategy[list[str]]], data: st.DataObject
) -> None:
    assert_runs_or_reports(data.draw(kind()))


@pytest.mark.slow
@KINDS
@settings(max_examples=MANY, **SETTINGS)
@given(data=st.data())
def test_fuzzed_cli_never_shows_a_traceback_in_many_examples(
    kind: Callable[[], st.SearchStrategy[list[str]]], data: st.DataObject
) -> None:
    assert_runs_or_reports(data.draw(kind()))
