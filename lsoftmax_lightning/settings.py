"""Checks and completion of the parsed settings, before classes are instantiated."""

from __future__ import annotations

import os
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace

from .datamodules.files import FileDataModule
from .errors import InputError
from .geometry import Separation
from .metrics import VERIFICATION_METRICS
from .modules import VerificationModule

_WRITER_SETTINGS: dict[str, tuple[Any, str]] = {
    "purge_step": (int | None, "a step below 2^63, or null"),
    "max_queue": (int, "an integer"),
    "flush_secs": (int | float, "a number of seconds"),
    "filename_suffix": (str, "a string"),
}
_MODES = {  # by the name of a metric without the stage
    "loss": "min",
    "margin_loss": "min",
    "eer": "min",
    "angle": "min",
    "acc": "max",
    "margin_acc": "max",
    "auc": "max",
    "tar_at_far_1e-2": "max",
    "tar_at_far_1e-3": "max",
}


_CLASS_METRICS = [
    "acc",
    "loss",
    "margin_loss",
    "angle",
    "feature_norm",
    *(f"centre_angle_{name}" for name in Separation._fields),
]
_WEIGHT_METRICS = [f"weight_angle_{name}" for name in Separation._fields]
_TRAIN_METRICS = ["train/loss", "train/acc", "train/margin_acc", "lambda"]


def as_list(loggers: Any) -> list[Any]:
    """Return the loggers of a Trainer, or their settings, as a list."""
    return loggers if isinstance(loggers, list) else [loggers]


def expand_backbone(model: Any) -> None:
    """Make a backbone that is given by a class path alone a class without arguments; the parser takes it for a name.

    Args:
        model: Settings of the module. They are changed in place.

    Raises:
        InputError: If the class cannot be imported.
    """
    arguments: Any = model.get("init_args") or {}
    backbone = arguments.get("backbone")
    if isinstance(backbone, str) and "." in backbone:
        try:
            resolve_name(backbone)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"model.backbone: cannot be imported, got {backbone!r} ({error}); correct it.") from error
        arguments.backbone = Namespace(class_path=backbone, init_args=Namespace())  # type: ignore[no-untyped-call]


def apply_root(trainer: Any) -> None:
    """Put the folders of loggers below ``default_root_dir``, as Lightning does for its default logger.

    Args:
        trainer: Settings of the Trainer. They are changed in place.
    """
    root = trainer.default_root_dir
    if root is None or "://" in root:
        return
    trainer.default_root_dir = os.path.abspath(root)  # for the saved config
    for logger in as_list(trainer.logger):
        settings: Any = getattr(logger, "init_args", None) or {}
        if settings.get("save_dir") and "://" not in settings.save_dir:
            settings.save_dir = os.path.join(trainer.default_root_dir, settings.save_dir)


def check_writer(loggers: Any) -> None:
    """Check settings that TensorBoardLogger does not check, and that would fail in a thread during training.

    Args:
        loggers: Settings of the loggers.

    Raises:
        InputError: If a setting has the wrong type.
    """
    for logger in as_list(loggers):
        settings = getattr(logger, "init_args", None) or {}
        for name, (kind, expected) in _WRITER_SETTINGS.items():
            value = settings.get(name, "" if kind is str else 0)
            huge = isinstance(value, int) and not -(2**63) <= value < 2**63
            if isinstance(value, bool) or not isinstance(value, kind) or huge:
                raise InputError(f"trainer.logger.{name}: must be {expected}, got {value!r}; correct it.")


def check_monitor(settings: Any) -> None:
    """Check that a run with these settings logs the metric of the best checkpoint.

    Classes outside this package may log any metric. With such a class nothing is checked here; Lightning checks the
    metric after the first validation.

    Args:
        settings: Settings of ``fit``.

    Raises:
        InputError: If the run does not log the metric.
    """
    monitor, model = settings.checkpoint.monitor, settings.model
    callbacks = [each for each in as_list(settings.trainer.callbacks or []) if isinstance(each, Namespace)]
    if monitor is None or not all(_names_package_class(each) for each in (model, *callbacks)):
        return
    names = [*_CLASS_METRICS, *(f"segment_{k}" for k in range(model.init_args.margin))]
    if is_kind(model, VerificationModule):
        names = list(VERIFICATION_METRICS)
    expected = [*(f"val/{name}" for name in (*names, *_WEIGHT_METRICS)), *_TRAIN_METRICS]
    if monitor not in expected:
        raise InputError(
            f"checkpoint.monitor: must be a metric of the run, got {monitor}; choose from {', '.join(expected)}."
        )


def _names_package_class(settings: Any) -> bool:
    kind = resolve_name(settings.class_path)
    return isinstance(kind, type) and is_package_class(kind)


def checkpoint_mode(monitor: str | None, mode: str) -> str:
    """Return ``min`` or ``max`` for the metric of the best checkpoint.

    Args:
        monitor: The metric, or None.
        mode: ``min``, ``max`` or ``auto``.

    Raises:
        InputError: If the mode would keep the worst checkpoint, or is ``auto`` for an unknown metric.
    """
    known = _MODES.get((monitor or "").rpartition("/")[2])
    if monitor is None or mode not in ("auto", "min", "max"):
        return "min" if mode == "auto" else mode
    if mode == "auto" and known is None:
        raise InputError(
            f"checkpoint.mode: is unknown for {monitor}, got auto; set min if lower values are better, or max."
        )
    if known not in (None, mode) and mode != "auto":
        raise InputError(f"checkpoint.mode: must be {known} for {monitor}, got {mode}; leave it out.")
    return known or mode


def is_kind(settings: Any, kind: type) -> bool:
    """Return whether settings are those of a class or its subclass; a ``class_path`` may also name a function."""
    given = resolve_name(settings.class_path) if isinstance(settings, Namespace) and "class_path" in settings else None
    return isinstance(given, type) and issubclass(given, kind)


def is_package_class(kind: type) -> bool:
    """Return whether a class is defined in this package."""
    return kind.__module__.startswith(f"{__package__}.")


def reads_files(data: Any) -> bool:
    """Return whether settings are those of a datamodule of this package whose constructor lists image files."""
    return is_kind(data, FileDataModule) and is_package_class(resolve_name(data.class_path))
