"""A wrong setting gives a one-line error that suggests the correct name."""

import copy
import functools
import operator
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from lightning import Callback, LightningModule, Trainer

from lsoftmax_lightning.callbacks import BestCheckpoint
from lsoftmax_lightning.cli import CONFIGS, main
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.lightning_cli import InstantiatedCLI, LSoftmaxCLI
from lsoftmax_lightning.settings import check_monitor
from lsoftmax_lightning.user_errors import errors_without_traceback

from .helpers.command_line import QUIET, SHORT, fails, small_data

SAMPLE_SIZE = 60
MIN_FRACTION = 0.9


class Typo(NamedTuple):
    """A mistake in the content of a config or in an option, and the name that must be suggested."""

    config: str
    content: dict[str, Any] | None
    words: tuple[str, ...]
    right: str


def drop(name: str, place: int) -> str:
    return name[:place] + name[place + 1 :]


def double(name: str, place: int) -> str:
    return name[:place] + name[place] + name[place:]


def swap(name: str, place: int) -> str:
    place = min(place, len(name) - 2)
    return name[:place] + name[place + 1] + name[place] + name[place + 2 :]


def entries(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Return the keys that lead to each value, and the value."""
    for key, value in content.items() if isinstance(content, dict) else []:
        yield (*keys, key), value
        yield from entries(value, (*keys, key))


def moved(content: dict[str, Any], keys: tuple[str, ...], new_keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return a copy of a config without the setting at ``keys``, and with a value at ``new_keys``."""

    def parent(path: tuple[str, ...]) -> dict[str, Any]:
        return functools.reduce(operator.getitem, path[:-1], copied)  # type: ignore[arg-type]

    copied = copy.deepcopy(content)
    del parent(keys)[keys[-1]]
    parent(new_keys)[new_keys[-1]] = value
    return copied


def option(keys: tuple[str, ...]) -> str:
    return ".".join(key for key in keys if key not in ("class_path", "init_args"))


def typos_of(path: Path, rng: random.Random) -> Iterator[Typo]:
    content = yaml.safe_load(path.read_text())
    found = [(keys, value) for keys, value in entries(content) if "backbone_args" not in keys]  # accepts any key
    groups = [(), *(keys for keys, value in found if isinstance(value, dict) and "class_path" not in value)]
    for keys, value in found:
        *parents, name = keys
        right = ".".join(keys)
        for edit in (drop, double, swap):
            if name == "class_path":
                module, dot, kind = value.rpartition(".")
                misspelt = module + dot + edit(kind, rng.randrange(len(kind)))
                yield Typo(path.name, moved(content, keys, keys, misspelt), (), kind)
                yield Typo(path.name, None, (f"--{option(keys)}={misspelt}",), kind)
            elif name != "init_args":
                misspelt = edit(name, rng.randrange(len(name)))
                yield Typo(path.name, moved(content, keys, (*parents, misspelt), value), (), right)
                if not isinstance(value, dict):
                    misspelt = edit(option(keys), rng.randrange(len(option(keys))))
                    yield Typo(path.name, None, (f"--{misspelt}={value}",), option(keys))
        if name != "class_path" and not isinstance(value, dict):
            other = (*rng.choice([group for group in groups if group != tuple(parents)]), name)
            yield Typo(path.name, moved(content, keys, other, value), (), right)
            yield Typo(path.name, None, (f"--{option(other)}={value}",), option(keys))


def all_typos() -> list[Typo]:
    rng = random.Random(0)
    return [typo for path in sorted(CONFIGS.glob("*.yaml")) for typo in typos_of(path, rng)]


def message(cli: InstantiatedCLI, typo: Typo, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return the printed error; None if the parser accepts the settings."""
    config = typo.config
    if typo.content is not None:
        config = "wrong.yaml"
        Path(config).write_text(yaml.safe_dump(typo.content, sort_keys=False))
    with suppress(SystemExit), errors_without_traceback():
        cli.parse_arguments(cli.parser, ["fit", f"--config={config}", *typo.words])
    return capsys.readouterr().err or None


def check(typos: list[Typo], capsys: pytest.CaptureFixture[str]) -> None:
    cli = InstantiatedCLI(["fit", "--config=digits.yaml", *QUIET])
    printed = [(typo, text) for typo in typos if (text := message(cli, typo, capsys)) is not None]
    assert len(printed) > 0.9 * len(typos)  # the parser accepts abbreviations
    for typo, text in printed:
        assert text.startswith("error: ")
        assert len(text.splitlines()) == 1, text
        if typo.content is not None:
            assert text.startswith("error: wrong.yaml, line "), text
    missed = [f"{typo.words or typo.content} -> {text}" for typo, text in printed if typo.right not in suggested(text)]
    assert len(missed) <= (1 - MIN_FRACTION) * len(printed), "\n".join(missed)


def suggested(text: str) -> set[str]:
    """Return the names that a message suggests; classes also without their module."""
    names = re.split(", | or ", text.partition("did you mean ")[2].strip().removesuffix("?"))
    return {name.removeprefix("--") for name in names} | {name.rpartition(".")[2] for name in names if name[:1] != "-"}


FLAT = "backbone: digits\nmargin: 4\n"
NO_BRACE = "trainer:\n  logger: {name: mine\ndata: 3\n"
MISSPELT = """model:
  class_path: ClassificationModule
  init_args:
    backbone: digits
    lambda_schedule: {class_path: PowerLaw, init_args: {bse: 1}}
"""
MISPLACED = "model:\n  class_path: ClassificationModule\n  init_args:\n    batch_size: 4\n"
NO_INIT_ARGS = "model:\n  class_path: ClassificationModule\n  backbone: digits\n"
WRONG_TYPE = "trainer:\n  max_epochs: 3\n  max_steps: many\n"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--model.margn 2", "--model.margn: is not a setting of ClassificationModule; did you mean --model.margin?"),
        ("--margin 2", "--margin: is not a setting of fit; did you mean --model.margin?"),
        (
            "--trainer.epochs 3",
            "--trainer.epochs: is not a setting of trainer; did you mean --trainer.max_epochs or --trainer.min_epochs?",
        ),
        (
            "--model.lr 0.1",
            "--model.lr: is not a setting of ClassificationModule; did you mean --model.optimizer.lr or "
            "--model.lr_scheduler?",
        ),
        (
            "--model.lambda_schedule PowerLw",
            "must name a subclass of LambdaSchedule, got PowerLw; did you mean PowerLaw?",
        ),
        (
            "--model.lambda_schedule={class_path: PowerLaw, init_args: {bse: 1}}",
            "did you mean --model.lambda_schedule.base?",
        ),
        (
            "--model.optimizer torch.optim.AdamW --model.optimizer.momentum 0.9",
            "is not a setting of AdamW; it has amsgrad,",
        ),
        ("--model.optimizer torch.optim.SGDD", "did you mean torch.optim.SGD"),
        ("--model.optimizer.lr high", "--model.optimizer.lr: must be float or Tensor, got high."),
        ("--model Mine", "a class of your own needs its import path, as in my_module.MyClass."),
        ("--model nowhere.Mine", "got nowhere.Mine; ModuleNotFoundError: No module named 'nowhere'."),
        (
            "--model torch.nn.Linear",
            "must name a subclass of LightningModule, got torch.nn.Linear; it is a class of another",
        ),
        ("--model lsoftmax_lightning.modules.LSoftmaxModul", "did you mean"),
        ("--model.backbone.width 3", "--model.backbone.width: has no class yet; give --model.backbone CLASS before it"),
        ("--trainer.callbacks+=EarlyStoping", "did you mean EarlyStopping?"),
        (
            "--trainer.callbacks+=EarlyStopping --trainer.callbacks.patince=3",
            "did you mean --trainer.callbacks.patience?",
        ),
        ("--trainer.logger.nam mine", "is not a setting of TensorBoardLogger; did you mean --trainer.logger.name?"),
        (
            "--model.optimizer={class_path: SGD, init_args: 3}",
            "--model.optimizer: must be a mapping of arguments, got 3.",
        ),
        ("--model.lambda_schedule=[{}]", "--model.lambda_schedule: must be LambdaSchedule, got [{}]."),
        ("--trainer.max_epochs many", "--trainer.max_epochs: must be int or null, got many."),
        ("--trainer.max_epochs", "--trainer.max_epochs: needs a value; write --trainer.max_epochs VALUE."),
        ("--trainer many", "--trainer: is a group of settings, got many; set one of them."),
        ("-model.margin 2", "-model.margin: has one dash; did you mean --model.margin?"),
        ("model.margin=2", "model.margin=2: has no dashes; did you mean --model.margin=2?"),
        ("digits.yaml", "digits.yaml: is not a setting; did you mean --config digits.yaml?"),
        ("--config digts.yaml", "did you mean digits.yaml?"),
        ("--conifg digits.yaml", "--conifg: is not a setting of fit; did you mean --config?"),
        ("--config", "--config: needs a value; write --config NAME."),
        ("--checkpoint.monitor val/accuracy", "got val/accuracy; choose from val/acc, val/loss,"),
        ("--checkpoint.monitor val/segment_4 --checkpoint.mode max", "val/segment_3, val/weight_angle_mean"),
    ],
)
def test_wrong_argument_gives_a_one_line_error(args: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [args] if "{" in args else args.split()
    printed = fails(capsys, "fit", "--config=digits.yaml", *QUIET, *words)
    assert expected in printed
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FLAT, "my.yaml, line 1: backbone: is not a setting of fit; did you mean model.init_args.backbone?"),
        (NO_BRACE, "my.yaml, line 3: is not valid YAML: did not find expected ',' or '}'."),
        (
            MISSPELT,
            "my.yaml, line 5: model.init_args.lambda_schedule.init_args.bse: is not a setting of PowerLaw; did you",
        ),
        (
            MISPLACED,
            "my.yaml, line 4: model.init_args.batch_size: is not a setting of ClassificationModule; did you mean",
        ),
        (
            NO_INIT_ARGS,
            "my.yaml, line 3: model.backbone: is an argument of ClassificationModule; move it below init_args.",
        ),
        (WRONG_TYPE, "my.yaml, line 3: trainer.max_steps: must be int, got many."),
        (
            "seed_everything: 1\nseed_everything: 2\n",
            "my.yaml: seed_everything: must be set once, got lines 1",
        ),
        ("- 1\n", "my.yaml: must be a mapping of settings, got [1]."),
    ],
)
def test_wrong_config_gives_a_one_line_error(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text(text)
    printed = fails(capsys, "fit", "--config=my.yaml", *QUIET)
    assert expected in printed
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "required, got nothing; use a config with model and data, such as --config digits.yaml."),
        (["--model.margin=2"], "--model.margin: has no class yet; give --model CLASS before it, or a config."),
        (
            ["--model=ClassificationModule"],
            "backbone: required by lsoftmax_lightning.ClassificationModule, got nothing",
        ),
    ],
)
def test_missing_setting_gives_a_one_line_error(
    args: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = fails(capsys, "fit", *args)
    assert expected in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["compare", "--config=digits.yaml", "--margin", "2"],
            "--margin: is not an option of lsoftmax_lightning compare",
        ),
        (["compare", "--config=digits.yaml", "--margin", "2"], "did you mean --margins?"),
        (["compare", "--config=digits.yaml", "--seed=1"], "did you mean --seeds?"),
        (["compare", "--config=digits.yaml", "--jbos=1"], "did you mean --jobs?"),
        (["compare", "--config=digits.yaml", "--margins", "two"], "--margins: invalid int value: 'two'"),
        (["compare", "--config=digits.yaml", "--model.margn=1"], "did you mean --model.margin?"),
        (["export", "--ckpt_path=a.ckpt", "--formt=onnx"], "did you mean --format?"),
        (["export", "--ckpt_path=a.ckpt", "--format=onx"], "--format: invalid choice: 'onx'"),
        (["export"], "the following arguments are required: --ckpt_path"),
        (["configs", "--cpy", "digits"], "unrecognized arguments: --cpy digits"),
    ],
)
def test_wrong_option_gives_a_one_line_error(
    args: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = fails(capsys, *args)
    assert expected in printed
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1


LOGS = """
from lightning import Callback
from lsoftmax_lightning import ClassificationModule
class Logs(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/mine", 1.0)
class Module(ClassificationModule):
    def on_validation_epoch_end(self):
        self.log("val/mine", 1.0)
"""


@pytest.mark.parametrize("setting", ["--model=logs.Module", "--trainer.callbacks+=logs.Logs"])
def test_custom_metrics_can_define_the_best_checkpoint(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("logs.py").write_text(LOGS)
    monkeypatch.syspath_prepend("")
    monitor = ["--checkpoint.monitor=val/mine", "--checkpoint.mode=max"]
    cli = main(["fit", "--config=digits.yaml", *SHORT, setting, *monitor])
    assert cli is not None
    assert BestCheckpoint in {type(each) for each in cli.trainer.checkpoint_callbacks if each.monitor == "val/mine"}


@pytest.mark.parametrize("config", ["digits.yaml", "lfw_fold.yaml"])
def test_every_logged_metric_can_define_the_best_checkpoint(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_data(config, tmp_path / "small", monkeypatch)
    if data:
        data += ["--data.val_fold=9", "--trainer.val_check_interval=null", "--trainer.check_val_every_n_epoch=1"]
    logged: set[str] = set()

    class Record(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            logged.update(trainer.callback_metrics)

    short = [word for word in SHORT if not word.startswith("--trainer.limit")]
    cli = LSoftmaxCLI(["fit", f"--config={config}", *short, *data, "--trainer.max_steps=-1"], callbacks=[Record()])
    settings = cli.config.fit
    assert "val/acc" in logged
    for name in logged:
        settings.checkpoint.monitor = name
        check_monitor(settings)
    settings.checkpoint.monitor = "val/accuracy"
    with pytest.raises(InputError, match="val/accuracy") as caught:
        check_monitor(settings)
    assert all(name in str(caught.value) for name in logged)


def test_correct_name_is_suggested_for_a_sample_of_typos(capsys: pytest.CaptureFixture[str]) -> None:
    check(random.Random(1).sample(all_typos(), SAMPLE_SIZE), capsys)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_correct_name_is_suggested_for_hundreds_of_typos(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    check(all_typos()[part::6], capsys)
