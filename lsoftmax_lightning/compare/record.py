"""Results of a run's test that the figures of a comparison show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer
from torch import Tensor
from typing_extensions import override

from ..atomic import torch_save
from ..callbacks.frames import ClassFrame, PairFrame, class_sample, take_frame
from ..callbacks.observer import HeadObserver

_NUM_POINTS = 2000  # of the scatter plot of features


class TestRecord(HeadObserver):
    """Write angles, confusion counts and projected features of a test to a small file without images.

    The file contains a dict that :func:`torch.load` reads with ``weights_only=True``. A test on classes has
    ``class_names``, ``points`` (N', 2), ``rays`` (C, 2), ``points_target`` (N',) (see
    :func:`~lsoftmax_lightning.pictures.plane`), ``counts`` (C, C) and ``angles`` (N,) in degrees. A test on pairs has
    ``cosines`` (P,) and ``same`` (P,).

    Args:
        path: Path of the file.
    """

    __test__ = False  # keeps pytest from collecting it

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "test":
            super().setup(trainer, pl_module, stage)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._sample = class_sample(_NUM_POINTS, trainer, trainer.num_test_batches)

    @override
    def observe_evaluation(self, pl_module: Any, images: Any, features: Tensor, logits: Tensor, target: Tensor) -> None:
        with self.optional("images, features and predictions", collective=True):
            self._sample.update(images, features, logits, target, pl_module.head.full_weight)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not self.is_observing:
            return
        frame = None
        with self.optional("the record of the test", collective=True):
            frame = take_frame(trainer, pl_module, "test", self._sample)
        if not trainer.is_global_zero:
            return
        if isinstance(frame, ClassFrame):
            names, points, rays, points_target = frame.scatter()
            counts, _ = frame.counts()
            content = {"class_names": names, "points": points, "rays": rays, "points_target": points_target}
            torch_save(content | {"counts": counts, "angles": frame.angles}, self.path)
        elif isinstance(frame, PairFrame):
            torch_save({"cosines": frame.cosines, "same": frame.same}, self.path)
