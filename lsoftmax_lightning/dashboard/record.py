"""What the pictures of a comparison need of each run's test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer
from torch import Tensor

from ..atomic import torch_save
from .observer import HeadObserver
from .snapshots import ClassFrame, PairFrame, class_sample, take_frame

_SHOWN = 2000  # features in a scatter


class TestRecord(HeadObserver):
    """Leaves angles, confusion and projected features of a test in a file, small and without images.

    The file is a dict that :func:`torch.load` reads with ``weights_only=True``: of a test on the classes of the head
    ``class_names``, ``points`` [N', 2], ``rays`` [C, 2], ``points_target`` [N'] (see
    :func:`~lsoftmax_lightning.dashboard.plots.plane`), ``counts`` [C, C] and ``angles`` [N] in degrees; of a test on
    pairs ``cosines`` [P] and ``same`` [P].

    Args:
        path: Of the file.
    """

    __test__ = False  # for pytest, which takes it for one

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begins to listen, if it is a test."""
        if stage == "test":
            super().setup(trainer, pl_module, stage)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begins anew."""
        self._sample = class_sample(_SHOWN, trainer, trainer.num_test_batches)

    def observe_evaluation(self, pl_module: Any, images: Any, features: Tensor, logits: Tensor, target: Tensor) -> None:
        """Takes a batch."""
        with self.optional("images, features and predictions", collective=True):
            self._sample.update(images, features, logits, target, pl_module.head.full_weight)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the file."""
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
