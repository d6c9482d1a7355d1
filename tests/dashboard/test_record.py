"""Record of a test, which shares the collection with the dashboard."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lsoftmax_lightning.callbacks import Dashboard
from lsoftmax_lightning.dashboard.collector import EvalCollector
from lsoftmax_lightning.dashboard.record import TestRecord

from ..helpers.training import BlobsDataModule, make_model, make_trainer


def record(callbacks: list[Any]) -> dict[str, Any]:
    path = Path("test.pt")
    path.unlink(missing_ok=True)
    logger = TensorBoardLogger(".", name="run")
    make_trainer(logger=logger, callbacks=callbacks).test(make_model(), BlobsDataModule(), verbose=False)
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@pytest.mark.parametrize(
    ("dashboard", "record_first", "collections"),
    [
        (Dashboard(), True, 1),
        (Dashboard(), False, 1),
        (Dashboard(every_n_epochs=0), True, 1),
        (Dashboard(max_samples=10), False, 2),  # the record keeps more samples
    ],
)
def test_a_test_is_collected_once_and_always_recorded(
    dashboard: Dashboard, record_first: bool, collections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = record([TestRecord(Path("test.pt"))])
    collectors: set[int] = set()
    update = EvalCollector.update

    def spy(self: EvalCollector, *args: Any) -> None:
        collectors.add(id(self))
        update(self, *args)

    monkeypatch.setattr(EvalCollector, "update", spy)
    callbacks = [TestRecord(Path("test.pt")), dashboard]
    found = record(callbacks if record_first else callbacks[::-1])
    assert len(collectors) == collections
    assert (
        found.keys()
        == alone.keys()
        == {"num_classes", "class_names", "points", "rays", "points_target", "projected", "counts", "angles"}
    )
    for name, value in alone.items():
        assert torch.equal(value, found[name]) if isinstance(value, Tensor) else value == found[name], name
    events = EventAccumulator("run/version_1").Reload()
    assert bool(events.Tags()["images"]) == (dashboard.every_n_epochs != 0)


def test_a_fit_is_not_recorded() -> None:
    trainer = make_trainer(callbacks=[TestRecord(Path("test.pt")), Dashboard()], logger=TensorBoardLogger("."))
    trainer.test(make_model(), BlobsDataModule(), verbose=False)
    Path("test.pt").unlink()
    trainer.fit(make_model(), BlobsDataModule())
    assert not Path("test.pt").exists()
    assert not trainer.callbacks[0].is_observing
