"""Record of the test of each run of a comparison."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from typing_extensions import override

from ..atomic import torch_save
from .collector import SnapshotObserver
from .snapshots import ClassSnapshot, PairSnapshot, Snapshot


class TestRecord(SnapshotObserver):
    """Write angles, confusion and projected features of a test to a small file without images.

    The file holds a dict that :func:`torch.load` reads with ``weights_only=True``. After a test on the classes of the
    head, it has ``num_classes``, ``class_names`` of the C' classes that plots show, ``points`` (N', 2), ``rays`` (C',
    2), ``points_target`` (N',) (see :func:`~lsoftmax_lightning.dashboard.plots.plane`), ``projected`` (whether the
    features have more than two dimensions), ``counts`` (C', C') and ``angles`` (N,) in degrees; after a test on pairs
    ``cosines`` (P,) and ``same`` (P,).

    Args:
        path: Path of the file.
    """

    __test__ = False  # not a test class of pytest

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.is_observing = False
        if stage == "test":
            super().setup(trainer, pl_module, stage)

    @override
    def observe_snapshot(self, trainer: Trainer, snapshot: Snapshot | None) -> None:
        if not trainer.is_global_zero:
            return
        if isinstance(snapshot, ClassSnapshot):
            scatter = snapshot.scatter()
            counts, _ = snapshot.confusion_counts()
            content = {
                "num_classes": len(snapshot.class_names),
                "class_names": scatter.class_names,
                "points": scatter.points,
                "rays": scatter.rays,
                "points_target": scatter.target,
                "projected": snapshot.features.shape[1] != 2,
                "counts": counts,
                "angles": snapshot.angles,
            }
            torch_save(content, self.path)
        elif isinstance(snapshot, PairSnapshot):
            torch_save({"cosines": snapshot.cosines, "same": snapshot.same}, self.path)
