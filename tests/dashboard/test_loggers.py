"""Figures on loggers of other services, with fakes that record the calls of their public interfaces."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure

from lsoftmax_lightning.callbacks import Dashboard

from ..helpers.training import BlobsDataModule, make_model, make_trainer


class FakeLogger(Logger):
    """Logger that records the figures it receives."""

    run_id = "run"

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[tuple[str, Figure]] = []

    @property
    def name(self) -> str:
        return "fake"

    @property
    def version(self) -> str:
        return "0"

    @property
    def experiment(self) -> Any:
        return self

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class WandbLogger(FakeLogger):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.figures += [(f"{key} at {step}", image) for image in images]


class MLFlowLogger(FakeLogger):
    def log_figure(self, run_id: str, figure: Figure, artifact_file: str) -> None:
        assert run_id == self.run_id
        self.figures.append((artifact_file, figure))


class CometLogger(FakeLogger):
    def log_figure(self, figure_name: str, figure: Figure, step: int) -> None:
        self.figures.append((f"{figure_name} at {step}", figure))


class NeptuneLogger(FakeLogger):
    def __getitem__(self, name: str) -> "NeptuneLogger":
        self.key = name
        return self

    def append(self, value: Figure, step: int) -> None:
        self.figures.append((f"{self.key} at {step}", value))


class CustomWandb(WandbLogger):
    """Subclass of a user."""


@pytest.mark.parametrize("kind", [WandbLogger, MLFlowLogger, CometLogger, NeptuneLogger, CustomWandb])
def test_figures_reach_the_logger(kind: type[FakeLogger]) -> None:
    logger = kind()
    make_trainer(logger=logger, callbacks=[Dashboard()]).fit(make_model(), BlobsDataModule())
    name = "val/{}/000008.png" if kind is MLFlowLogger else "val/{} at 8"
    expected = {name.format(plot) for plot in ("angles", "class_angles", "confusion", "features", "segments")}
    assert expected <= {name for name, _ in logger.figures}
    assert all(isinstance(figure, Figure) for _, figure in logger.figures)
    assert not list(Path().rglob("*.png"))


def test_logger_without_figure_support_receives_none() -> None:
    logger = FakeLogger()
    make_trainer(logger=logger, callbacks=[Dashboard()]).fit(make_model(), BlobsDataModule())
    assert not logger.figures
