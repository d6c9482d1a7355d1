"""Output of the commands."""

import logging
import warnings

import pytest
import torch
from rich.console import Console

from lsoftmax_lightning import screen
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.screen import metrics_table, quiet_logs

from .helpers.command_line import QUIET


def test_metrics_are_grouped_rounded_and_have_units(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "test/weight_angle_min": 79.26802,
        "test/mine[0]": 0.123456,
        "test/segment_0": 0.5,
        "test/loss": 0.05329656,
        "test/acc": 0.9777777,
        "test/angle": 44.244297,
    }
    Console(width=80).print(metrics_table(metrics, "Test of [the] model"))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(line.split()) for line in lines if line] == [
        "Test of [the] model",
        "Accuracy and loss",
        "accuracy 97.78 %",
        "cross-entropy without the margin 0.0533",
        "Compactness",
        "mean angle of a sample to its class weight 44.2°",
        "Separation",
        "angle between class weights, smallest 79.3°",
        "Other metrics",
        "mine[0] 0.1235",
    ]
    assert max(map(len, lines)) < 80


def test_advertising_messages_are_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with quiet_logs():
        log.info("💡 Tip: buy this")
        log.info("TPU available: False")
        log.info("GPU available: True (cuda), used: True")
    log.info("💡 Tip: of the user's own Trainer")
    assert caplog.messages == ["GPU available: True (cuda), used: True", "💡 Tip: of the user's own Trainer"]


def test_warning_of_a_library_is_printed_without_its_location() -> None:
    def printed(filename: str) -> str:
        return warnings.formatwarning("careful", UserWarning, filename, 7)

    with quiet_logs():
        assert printed(torch.__file__) == printed(screen.__file__) == "warning: careful\n"
        assert printed("/home/me/train.py") == "warning: /home/me/train.py:7: careful\n"
    assert "7" in printed(torch.__file__)


def test_run_ends_with_its_metrics_and_folders(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    main(["fit", "--config=digits.yaml", *QUIET, "--trainer.max_epochs=1"])
    printed = capsys.readouterr().out
    assert printed.startswith("Test of the best checkpoint, chosen by val/loss ")
    assert "accuracy " in printed
    folder = "runs/digits/m4-s0"
    assert [message for message in caplog.messages if ":" in message or "run" in message][-3:] == [
        f"Run folder: {folder}",
        f"Tested checkpoint: {folder}/checkpoints/best.ckpt",
        "Dashboard: tensorboard --logdir runs",
    ]
    assert not [message for message in caplog.messages if "Tip" in message or "Restoring" in message]

    main(["test", "--config=digits.yaml", *QUIET, "--ckpt_path=best"])
    assert capsys.readouterr().out.split()[:2] == ["Test", "Accuracy"]
    main(["validate", "--config=digits.yaml", *QUIET, "--ckpt_path=best", "--verbose=false"])
    assert not capsys.readouterr().out
