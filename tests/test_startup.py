"""Imports and commands that do not need torch start without it."""

import gc
import os
import pickle
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import lsoftmax_lightning.__main__
from lsoftmax_lightning.cli import COMMANDS, LIGHTNING_COMMANDS, main
from lsoftmax_lightning.config_files import flat
from lsoftmax_lightning.lightning_cli import LSoftmaxCLI
from lsoftmax_lightning.short_help import SETTINGS
from lsoftmax_lightning.signals import Stopped, exit_on_signals, stop_if_received

HEAVY = {"jsonargparse", "lightning", "matplotlib", "numpy", "scipy", "sklearn", "torch", "torchmetrics", "torchvision"}


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["-c", "import lsoftmax_lightning"], 0),
        (["-m", "lsoftmax_lightning", "--version"], 0),
        (["-m", "lsoftmax_lightning", "--help"], 0),
        (["-m", "lsoftmax_lightning", "fit", "--help"], 0),
        (["-m", "lsoftmax_lightning", "configs"], 0),
        (["-m", "lsoftmax_lightning", "configs", "--copy", "nope"], 1),
        (["-m", "lsoftmax_lightning", "fiet"], 2),
        (["-m", "lsoftmax_lightning"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_heavy_libraries_are_not_imported(args: list[str], code: int) -> None:
    done = python("-X", "importtime", *args)
    assert done.returncode == code
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "lsoftmax_lightning" in imported
    assert not HEAVY & {name.partition(".")[0] for name in imported}


def test_configs_are_read_as_utf_8_in_any_locale() -> None:
    command = ("-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-m", "lsoftmax_lightning", "configs")
    done = python(*command)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_help_and_print_config_import_no_scikit_learn() -> None:
    code = """
from contextlib import suppress
from lsoftmax_lightning.cli import main
for args in (["fit", "--full_help"], ["fit", "--config=digits.yaml", "--print_config"]):
    with suppress(SystemExit):
        main(args)
"""
    done = python("-X", "importtime", "-c", code)
    assert done.returncode == 0
    assert "--model.help" in done.stdout
    assert "class_path: lsoftmax_lightning.ClassificationModule" in done.stdout
    assert "torchmetrics" in done.stderr
    assert "sklearn" not in done.stderr


@pytest.mark.parametrize("command", LIGHTNING_COMMANDS)
def test_the_short_help_has_names_and_defaults_of_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    shown = set(re.findall(r"^  --([\w.]+)", printed, re.MULTILINE))
    assert 8 <= len(shown) <= 20
    defaults = ["--model=ClassificationModule", "--model.backbone=cifar10", "--data=CIFAR10DataModule"]
    with pytest.raises(SystemExit):
        main([command, *defaults, "--print_config"])
    settings = flat(yaml.safe_load(capsys.readouterr().out))
    assert shown <= settings.keys() | {"config"}
    for setting in SETTINGS:
        if command in setting.commands.split() and setting.default is not None:
            assert settings[setting.key] == setting.default


@pytest.mark.parametrize("config", [["-c", "cifar10"], ["--config=cifar10.yaml"], ["--config", "cifar10.yaml"]])
def test_the_short_help_has_the_values_of_a_config(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *config, "-h"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "such as resnet18 (default: cifar10)" in printed
    main(["fit", "--config=missing.yaml", "-h"])
    assert "such as resnet18 --model.optimizer.lr" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_command(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS.keys() == LSoftmaxCLI.subcommands().keys() | {"compare", "configs", "export"}
    with pytest.raises(SystemExit) as caught:
        main([option])
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, sentence in COMMANDS.items():
        assert f"{name} {sentence}" in printed
        assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("args", "end"),
    [
        (["fiet"], "got 'fiet'; did you mean fit?\n"),
        (["exports", "--help"], "got 'exports'; did you mean export?\n"),
        (["frobnicate"], "got 'frobnicate'; see lsoftmax_lightning --help.\n"),
        ([], "got nothing; see lsoftmax_lightning --help.\n"),
    ],
)
def test_wrong_command_gives_a_one_line_error(args: list[str], end: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    start = "error: command: must be fit, validate, test, predict, compare, configs or export, "
    assert capsys.readouterr().err == start + end


def test_config_before_the_command_may_have_settings_of_several_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("settings.yaml").write_text("fit:\n  trainer: {max_epochs: 3}\ntest:\n  trainer: {max_epochs: 3}\n")
    with pytest.raises(SystemExit) as caught:
        main(["--config=settings.yaml", "fit", "--config=digits.yaml", "--print_config"])
    assert caught.value.code == 0
    assert "class_path: lsoftmax_lightning.ClassificationModule" in capsys.readouterr().out


@pytest.mark.slow
def test_public_names_are_imported_lazily() -> None:
    code = """
import sys
import lsoftmax_lightning
assert set(lsoftmax_lightning.__all__) <= set(dir(lsoftmax_lightning))
assert "torch" not in sys.modules
assert lsoftmax_lightning.metrics.__name__ == "lsoftmax_lightning.metrics"
from lsoftmax_lightning import *
assert LSoftmaxLinear is lsoftmax_lightning.heads.LSoftmaxLinear
assert ClassificationModule is lsoftmax_lightning.ClassificationModule
assert issubclass(ClassificationModule, LSoftmaxModule) and issubclass(VerificationModule, LSoftmaxModule)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert pickle.loads(pickle.dumps(lsoftmax_lightning.LSoftmaxLinear)) is lsoftmax_lightning.LSoftmaxLinear
    for name in ("nothing", "_nothing", "Heads"):
        with pytest.raises(AttributeError, match=f"module 'lsoftmax_lightning' has no attribute '{name}'"):
            getattr(lsoftmax_lightning, name)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from lsoftmax_lightning import nothing  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_the_import_of_torch_ends_the_command(name: str, code: int) -> None:
    Path("torch.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    done = python("-m", "lsoftmax_lightning", "fit", "--config=digits.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"Stopped by {name}.\n")


def test_a_signal_that_a_library_swallows_ends_the_command() -> None:
    def swallow_and_go_on() -> None:
        with suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        stop_if_received()
        pytest.fail("the command continues")

    with pytest.raises(Stopped), exit_on_signals():
        swallow_and_go_on()


@pytest.mark.slow
def test_only_the_command_process_freezes_its_imports() -> None:
    code = """
import gc
from contextlib import suppress
from lsoftmax_lightning.__main__ import main, run
for command in (lambda: main(["fit", "--full_help"]), run):
    with suppress(SystemExit):
        command()
    print("collects", gc.isenabled(), "frozen", gc.get_freeze_count() > 0)
"""
    lines = python("-c", code, "fit", "--full_help").stdout.splitlines()
    expected = ["collects True frozen False", "collects True frozen True"]  # main, run
    assert [line for line in lines if line.startswith("collects")] == expected
    assert gc.isenabled()


@pytest.mark.parametrize("safe", [False, True])
def test_the_command_finds_modules_in_the_working_directory(safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = SimpleNamespace(safe_path=safe)
    monkeypatch.setattr(lsoftmax_lightning.__main__, "main", lambda: None)
    monkeypatch.setattr(lsoftmax_lightning.__main__, "sys", SimpleNamespace(flags=flags, path=["scripts"]))
    lsoftmax_lightning.__main__.run()
    lsoftmax_lightning.__main__.run()
    assert lsoftmax_lightning.__main__.sys.path == (["scripts"] if safe else [os.getcwd(), "scripts"])
