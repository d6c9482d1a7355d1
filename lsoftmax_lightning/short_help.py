"""The settings of ``fit``, ``validate``, ``test`` and ``predict`` that most runs need, for their ``--help``.

This module does not import torch.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import yaml

from .config_paths import find_config
from .errors import InputError


class Setting(NamedTuple):
    """A setting in the short help."""

    commands: str
    """Commands with this setting, separated by spaces."""
    key: str
    """Full name of the setting."""
    metavar: str
    """Placeholder of the value."""
    text: str
    """Description."""
    default: Any = None
    """Default value; None if there is none."""


ALL = "fit validate test predict"
SETTINGS = (
    Setting(ALL, "config", "NAME", "path of a config, or name of a shipped one (see `configs`)"),
    Setting("fit", "model.margin", "M", "margin m, an integer; 1 is plain softmax", 4),
    Setting("fit", "model.backbone", "NAME", "network of the paper or of torchvision, such as resnet18"),
    Setting("fit", "model.optimizer.lr", "LR", "learning rate", 0.1),
    Setting(ALL, "data.root", "FOLDER", "folder of the images"),
    Setting(ALL, "data.batch_size", "N", "images per step, on all devices together"),
    Setting("fit", "data.train_size", "N", "number or fraction of the training images to train on; null for all"),
    Setting("predict", "data.predict_folder", "FOLDER", "folder of images to predict instead of the test set"),
    Setting(
        "predict", "predictions.output", "FILE", "output file, .csv or .parquet; by default in the folder of the run"
    ),
    Setting("fit", "trainer.max_epochs", "N", "length of the run in epochs"),
    Setting("fit", "trainer.max_steps", "N", "maximum length of the run in steps; -1 for no limit", -1),
    Setting(ALL, "trainer.accelerator", "KIND", "cpu, gpu or auto", "auto"),
    Setting(ALL, "trainer.devices", "N", "number of devices, or auto for all", "auto"),
    Setting(ALL, "trainer.precision", "KIND", "32-true, or bf16-mixed for speed on a GPU"),
    Setting("fit", "checkpoint.monitor", "METRIC", "metric that defines the best checkpoint", "val/acc"),
    Setting("fit", "dashboard.every_n_epochs", "N", "epochs between plots; 0 for no plots"),
    Setting(ALL, "seed_everything", "SEED", "seed of weights, shuffle and augmentation", 0),
    Setting("fit", "ckpt_path", "PATH", "checkpoint to resume from; last for that of the last run"),
    Setting("validate test predict", "ckpt_path", "PATH", "checkpoint; best or last for that of the last run of fit"),
)


def print_short_help(command: str, description: str, args: list[str]) -> None:
    """Print the settings of a command that most runs need.

    Args:
        command: The command.
        description: Description of the command.
        args: Arguments of the command. If they contain configs, these determine the defaults shown.
    """
    parser = argparse.ArgumentParser(
        prog=f"lsoftmax_lightning {command}",
        usage="%(prog)s --config NAME [--KEY VALUE ...]",
        description=description,
        epilog="All settings: %(prog)s --full_help. Settings of a class, for example: --model.help VerificationModule",
        add_help=False,
    )
    given: dict[str, Any] = {}
    names = [name for word, name in pairwise(args) if word in ("-c", "--config")]
    for name in [*names, *(word.removeprefix("--config=") for word in args if word.startswith("--config="))]:
        with suppress(InputError, OSError, ValueError, yaml.YAMLError):  # the command itself reports a bad config
            _add_values(yaml.safe_load(find_config(name).read_text(encoding="utf-8")), "", given)
    group = parser.add_argument_group("settings that most runs need")
    for setting in SETTINGS:
        if command in setting.commands.split():
            default = given.get(setting.key, setting.default)
            text = setting.text if default is None else f"{setting.text} (default: {default})"
            group.add_argument(f"--{setting.key}", metavar=setting.metavar, help=text.replace("%", "%%"))
    parser.print_help()


def _add_values(node: Any, prefix: str, values: dict[str, Any]) -> None:
    """Add the values of a config by their names on the command line, without ``init_args``."""
    for key, value in node.items() if isinstance(node, dict) else ():
        name = prefix if key == "init_args" else f"{prefix}.{key}".removeprefix(".")
        if isinstance(value, dict):
            _add_values(value, name, values)
        else:
            values[name] = value
