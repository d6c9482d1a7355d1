"""Figures on loggers of Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure


def _tensorboard(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.experiment.add_figure(name, figure, step)


def _wandb(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.log_image(name, [figure], step)


def _mlflow(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"{name}/{step:06d}.png")


def _comet(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(figure_name=name, figure=figure, step=step)


def _neptune(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.experiment[name].append(figure, step=step)


_WRITERS: dict[str, Callable[[Any, str, Figure, int], None]] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
    "NeptuneLogger": _neptune,  # absent from Lightning 2.6
}


def _writer(logger: Logger) -> Callable[[Any, str, Figure, int], None] | None:
    return next((_WRITERS[kind.__name__] for kind in type(logger).__mro__ if kind.__name__ in _WRITERS), None)


def figure_loggers(trainer: Trainer) -> list[Logger]:
    """Return the loggers that support figures: TensorBoard, W&B, MLflow, Comet, Neptune and subclasses."""
    return [logger for logger in trainer.loggers if _writer(logger)]


def log_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Log a figure.

    Args:
        logger: One of :func:`figure_loggers`.
        name: Name, such as ``val/features``.
        figure: The figure.
        step: Number of optimiser steps taken.
    """
    writer = _writer(logger)
    assert writer is not None
    writer(logger, name, figure, step)
