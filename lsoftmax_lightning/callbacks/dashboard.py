"""Pictures of a training for TensorBoard, and for papers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..atomic import atomic_path, write_csv
from ..class_names import names_by_index
from ..errors import InputError
from ..geometry import target_angles
from .baseline import ANGLE_BINS, softmax_angles
from .frames import ClassFrame, ClassSample, Frame, Picture, class_sample, latest_angles, take_frame
from .observer import HeadObserver, tensorboard_loggers

_MAX_TRAIN_ANGLES = 1_000_000  # samples, of 4 bytes each
_MAX_TRAIN_BATCHES = 1000  # small tensors, of which each takes several hundred bytes more


class Dashboard(HeadObserver):
    """Draws a training on TensorBoard, for any module with an L-Softmax ``head``; without it, does nothing.

    After validation: the features (:func:`~lsoftmax_lightning.pictures.plane`), the angles of samples to their class,
    the angles between class weights, the confusion matrix and the most confused images; where validation is of pairs of
    images, the ROC curve, the angles of the pairs and the hardest pairs. After training also the embedding projector.
    After a test the same of its images.

    The angles of training are of the batches that are logged since the last validation, of at most the last million
    samples, in the first process. Several validation dataloaders are taken for one. Training waits for no picture:
    those that would take more than ``max_share`` of its time are drawn when it is over.

    Args:
        every_n_epochs: Epochs between the pictures of a validation, from the first on; the last is always drawn. By
            default there are up to ten in a run, as many as TensorBoard shows; 0 is for no pictures at all.
        max_samples: Features in the scatter and in the projector; all other pictures are of all images.
        max_share: The most that drawing may take of the time of training.
        save: Whether to leave every picture as a PNG file, and the numbers in it as CSV, in the folder ``dashboard`` of
            the run. Texts that a spreadsheet would run as a formula have a ``'`` in front.

    Raises:
        InputError: If an argument is out of range, or there is no logger to say where to save.
    """

    def __init__(
        self, every_n_epochs: int | None = None, max_samples: int = 2000, max_share: float = 0.02, save: bool = False
    ) -> None:
        if every_n_epochs is not None and every_n_epochs < 0:
            raise InputError(f"every_n_epochs must be 0 (no pictures) or more, got {every_n_epochs}.")
        if max_samples < 1:
            raise InputError(f"max_samples must be at least 1, got {max_samples}.")
        if not 0 <= max_share <= 1:
            raise InputError(f"max_share must be from 0 to 1, got {max_share}.")
        self.every_n_epochs, self.max_samples, self.max_share, self.save = every_n_epochs, max_samples, max_share, save

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begins to listen, if there is somewhere to draw."""
        log_dir = trainer.log_dir  # to be asked on every process
        if self.save and (log_dir is None or not trainer.loggers) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError("Dashboard(save=True) writes into the folder of the run, which a logger has to name.")
        writable = self.save or tensorboard_loggers(trainer)
        self.is_observing = False
        if writable and self.every_n_epochs != 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            super().setup(trainer, pl_module, stage)
        if self.is_observing:
            self._check_names(trainer, pl_module.head.num_classes)
        self._folder = Path(str(log_dir), "dashboard")
        self._sample: ClassSample | None = None
        self._train_angles: list[Tensor] = []
        self._latest: Frame | None = None
        self._kept: Frame | None = None
        self._pending: list[Frame] = []  # on the first process alone
        self._baselines: dict[str, dict[str, Tensor]] = {}
        self._next_epoch = 0
        self._began = time.perf_counter()
        self._spent = 0.0  # seconds of the time since then
        self._cost = 1.0  # of a frame; at first a guess

    def observe_training(self, trainer: Trainer, pl_module: Any, features: Tensor, target: Tensor) -> None:
        """Keep the angles of a step."""
        with self.optional("the angles of training", collective=True):
            self._train_angles.append(target_angles(features, pl_module.head.class_weights(target)))
        if len(self._train_angles) >= _MAX_TRAIN_BATCHES:  # without validation nothing else would empty the list
            self._train_angles = [latest_angles(self._train_angles, _MAX_TRAIN_ANGLES)]

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begins anew."""
        self._begin(trainer, trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begins anew."""
        self._begin(trainer, trainer.num_test_batches)

    def observe_evaluation(self, pl_module: Any, images: Any, features: Tensor, logits: Tensor, target: Tensor) -> None:
        """Takes a batch of a validation or a test."""
        if self._sample is not None:
            with self.optional("images, features and predictions", collective=True):
                self._sample.update(images, features, logits, target, pl_module.head.full_weight)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keeps the validation, and draws what there is time for."""
        if not self.is_observing or trainer.sanity_checking:
            return
        start = time.perf_counter()
        self._latest = self._frame(trainer, pl_module, "val")
        self._spent += time.perf_counter() - start
        if trainer.state.fn != TrainerFn.FITTING:
            self._draw_all(trainer)
            return
        if trainer.current_epoch >= self._next_epoch:
            self._next_epoch = trainer.current_epoch + self._epochs_between(trainer)
            self._queue(trainer)
        while self._pending and self._spent + self._cost <= self.max_share * (time.perf_counter() - self._began):
            self._draw_next(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draws the test."""
        if self.is_observing:
            self._latest = self._frame(trainer, pl_module, "test")
            self._draw_all(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draws what is left, and the last validation in the projector."""
        if not self.is_observing:
            return
        self._draw_all(trainer)
        if isinstance(self._latest, ClassFrame) and trainer.is_global_zero:
            with self.optional("the projector"):
                for logger in tensorboard_loggers(trainer):
                    logger.experiment.add_embedding(
                        **self._latest.embedding(), global_step=self._latest.step, tag="val"
                    )

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Draws what was kept of a training that failed, but lets one that was interrupted go."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, Exception) and self.is_observing:
            self._draw_all(trainer)

    def _check_names(self, trainer: Trainer, num_classes: int) -> None:
        """Warn of classes without a name where others have one."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        unnamed = sorted(set(range(num_classes)) - names_by_index(data).keys())
        if unnamed and getattr(data, "class_names", None) is not None:
            rank_zero_warn(
                f"class_names: must have a name for each of the {num_classes} classes, got none for class "
                f"{unnamed[0]}; the dashboard shows {len(unnamed)} classes by their index."
            )

    def _begin(self, trainer: Trainer, num_batches: Sequence[float]) -> None:
        self._sample = class_sample(self.max_samples, trainer, num_batches)

    def _frame(self, trainer: Trainer, pl_module: Any, stage: str) -> Frame | None:
        """What was seen of this validation or test."""
        train_angles = [latest_angles(self._train_angles, _MAX_TRAIN_ANGLES)] if self._train_angles else []
        sample, self._sample, self._train_angles = self._sample, None, []  # which would keep memory of the device
        with self.optional(f"{stage} pictures", collective=True):
            return take_frame(trainer, pl_module, stage, sample, train_angles)
        return None

    def _epochs_between(self, trainer: Trainer) -> int:
        """Epochs from one kept validation to the next."""
        if self.every_n_epochs:
            return self.every_n_epochs
        steps = max(1, trainer.num_training_batches / trainer.accumulate_grad_batches)  # infinite without a length
        lengths = [length for length in (trainer.max_epochs or -1, trainer.max_steps / steps) if length > 0]
        return max(1, math.ceil(min(lengths) / 9)) if lengths else 10

    def _queue(self, trainer: Trainer) -> None:
        """Keeps the latest frame to be drawn, once."""
        if trainer.is_global_zero and self._latest is not None and self._latest is not self._kept:
            self._pending.append(self._latest)
            self._kept = self._latest

    def _draw_all(self, trainer: Trainer) -> None:
        self._queue(trainer)
        while self._pending:
            self._draw_next(trainer)

    def _draw_next(self, trainer: Trainer) -> None:
        """Draws the frame that has waited longest."""
        start = time.perf_counter()
        frame = self._pending.pop(0)
        with self.optional(f"{frame.stage} pictures"):
            self._draw(trainer, frame)
        self._cost = time.perf_counter() - start
        self._spent += self._cost

    def _draw(self, trainer: Trainer, frame: Frame) -> None:
        writers = [logger.experiment for logger in tensorboard_loggers(trainer)]
        for name, angles in frame.angle_samples().items():
            if len(angles := angles[angles.isfinite()]):
                for writer in writers:
                    writer.add_histogram(f"angles/{name}", angles, frame.step, bins=ANGLE_BINS)
        if frame.margin > 1:
            stage = list(frame.angle_samples())[-1]
            if stage not in self._baselines:
                self._baselines[stage] = softmax_angles(self._folder.parent, stage)
            frame.baseline = self._baselines[stage]
        for picture in frame.draw():
            with self.optional(f"{frame.stage}/{picture.name}"):
                if self.save:
                    self._save(frame, picture)
                for writer in writers:
                    writer.add_figure(f"{frame.stage}/{picture.name}", picture.figure, frame.step)

    def _save(self, frame: Frame, picture: Picture) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        step = "" if frame.lambda_ is None else f"_{frame.step:06d}"
        path = self._folder / f"{frame.stage}_{picture.name}{step}"
        with atomic_path(path.with_suffix(".png")) as part:
            picture.figure.savefig(part, format="png", dpi=200)
        write_csv(path.with_suffix(".csv"), [picture.header, *picture.rows])
