"""The callback that draws a training for TensorBoard, and for papers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..atomic import atomic_path, write_csv
from ..class_names import names_by_index
from ..compat import current_datamodule
from ..errors import InputError
from ..geometry import target_angles
from ..heads import LSoftmaxLinear
from ..html_page import Section, figure_html, table_html, text_html, write_page
from ..metric_labels import labelled
from ..provenance import machine_and_versions
from .baseline import ANGLE_BINS, baseline_angles
from .collector import SnapshotObserver
from .loggers import figure_loggers, log_figure
from .observer import tensorboard_loggers
from .panels import Plot, draw
from .plots import STAGES
from .snapshots import ClassSnapshot, Snapshot

MAX_TRAIN_ANGLES = 1_000_000  # samples, of 4 bytes each
MAX_TRAIN_BATCHES = 1000  # small tensors, each of which takes several hundred bytes more


class Dashboard(SnapshotObserver):
    """Draws plots of a training on TensorBoard, for any module with an L-Softmax ``head``; otherwise does nothing.

    Loggers of W&B, MLflow, Comet and Neptune take the figures too; histograms and the projector are for TensorBoard.

    After a validation: the features (:func:`~lsoftmax_lightning.dashboard.plots.plane`), the angles of samples to their
    class, the angles between class weights, the confusion matrix and the most confused images. After a validation on
    pairs of images: the ROC curve, the angles of the pairs and the hardest pairs. After training also the embedding
    projector. After a test the same plots of its images.

    The angles of training are those of the batches that were logged since the last validation, at most the last million
    samples, on rank 0. Several validation dataloaders count as one. Training does not wait for plots: those that would
    take more than ``max_share`` of its time are drawn when it is over.

    Args:
        every_n_epochs: Epochs between the plots of two validations, from the first one on; the last is always drawn.
            Default: at most ten in a run, as many as TensorBoard shows; 0: no plots.
        max_samples: Features in the scatter and in the projector; all other plots use all images.
        max_share: Largest fraction of the training time that drawing may take.
        save: Format of a file of every plot, beside the numbers in it as CSV, in the folder ``dashboard`` of the run;
            ``True`` means PNG. Texts that a spreadsheet would run as a formula start with a ``'``.
            Default: no files.
        html: Whether to write ``report.html`` to the folder of the run: metrics, the last plots, settings, machine and
            versions in one file. A test adds its own part.

    Raises:
        InputError: If an argument is out of range, or plots are to be saved without a logger.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        max_samples: int = 2000,
        max_share: float = 0.02,
        save: bool | Literal["png", "svg", "pdf"] = False,
        html: bool = False,
    ) -> None:
        if every_n_epochs is not None and every_n_epochs < 0:
            raise InputError(f"every_n_epochs must be 0 (no plots) or more, got {every_n_epochs}.")
        if max_samples < 1:
            raise InputError(f"max_samples must be at least 1, got {max_samples}.")
        if not 0 <= max_share <= 1:
            raise InputError(f"max_share must be from 0 to 1, got {max_share}.")
        if save not in (True, False, "png", "svg", "pdf"):
            raise InputError(f"save must be true, false, png, svg or pdf, got {save}.")
        if (save or html) and every_n_epochs == 0:
            raise InputError("every_n_epochs: must be at least 1 with save or html, got 0 (no plots); set it to 1.")
        self.every_n_epochs, self.max_samples, self.max_share, self.save = every_n_epochs, max_samples, max_share, save
        self.html = html
        # sections of the page by stage
        self._metrics: dict[str, list[Section]] = {}
        self._plots: dict[str, Section] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir  # a collective
        if (self.save or self.html) and (log_dir is None or not trainer.loggers) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError("save and html: Dashboard writes into the folder of the run, which a logger has to name.")
        writable = self.save or self.html or figure_loggers(trainer)
        self.is_observing = False
        if writable and self.every_n_epochs != 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            super().setup(trainer, pl_module, stage)
        if (head := self.observed_head(pl_module)) is not None:
            self._check_names(trainer, head.num_classes)
        self._folder = Path(str(log_dir), "dashboard")
        if stage == "fit":
            self._metrics.clear()
            self._plots.clear()
        self._train_angles: list[Tensor] = []
        self._latest: Snapshot | None = None
        self._last_queued: Snapshot | None = None
        self._pending: list[Snapshot] = []  # on rank 0 only
        self._baselines: dict[str, dict[str, Tensor]] = {}
        self._next_epoch = 0
        self._start_time = time.perf_counter()
        self._drawing_time = 0.0  # seconds since then
        self._snapshot_time = 1.0  # seconds to draw a snapshot; a guess until the first one

    @override
    def observe_training(self, trainer: Trainer, head: LSoftmaxLinear, features: Tensor, target: Tensor) -> None:
        with self.optional("the angles of training", collective=True):
            self._train_angles.append(target_angles(features, head.class_weights(target)))
        if len(self._train_angles) >= MAX_TRAIN_BATCHES:  # without validation nothing else would empty the list
            self._train_angles = [_latest_angles(self._train_angles)]

    @override
    def observe_snapshot(self, trainer: Trainer, snapshot: Snapshot | None) -> None:
        if snapshot is not None and self._train_angles:
            snapshot.train_angles = _latest_angles(self._train_angles).cpu()
        self._train_angles = []
        self._latest = snapshot

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = time.perf_counter()
        super().on_validation_end(trainer, pl_module)
        if not self.is_observing or trainer.sanity_checking:
            return
        self._drawing_time += time.perf_counter() - start
        if trainer.state.fn != TrainerFn.FITTING:
            self._draw_all(trainer)
            self._write_page(trainer)
            return
        if trainer.current_epoch >= self._next_epoch:
            self._next_epoch = trainer.current_epoch + self._epochs_between(trainer)
            self._queue(trainer)
        while self._pending and self._has_time():
            self._draw_next(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        if self.is_observing:
            self._draw_all(trainer)
            self._write_page(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.is_observing:
            return
        self._draw_all(trainer)
        self._write_page(trainer)
        if isinstance(self._latest, ClassSnapshot) and trainer.is_global_zero:
            with self.optional("the projector"):
                for logger in tensorboard_loggers(trainer):
                    logger.experiment.add_embedding(
                        **self._latest.embedding(), global_step=self._latest.step, tag="val"
                    )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, Exception) and self.is_observing:  # an interrupted run ends without drawing
            self._draw_all(trainer)

    def _check_names(self, trainer: Trainer, num_classes: int) -> None:
        """Warn of classes without a name where others have one."""
        data = current_datamodule(trainer)
        unnamed = sorted(set(range(num_classes)) - names_by_index(data).keys())
        if unnamed and getattr(data, "class_names", None) is not None:
            rank_zero_warn(
                f"class_names: must have a name for each of the {num_classes} classes, got none for class "
                f"{unnamed[0]}; the dashboard shows {len(unnamed)} classes by their index."
            )

    def _epochs_between(self, trainer: Trainer) -> int:
        """Return the epochs between two validations that are drawn."""
        if self.every_n_epochs:
            return self.every_n_epochs
        steps = max(1, trainer.num_training_batches / trainer.accumulate_grad_batches)  # infinite without a length
        lengths = [length for length in (trainer.max_epochs or -1, trainer.max_steps / steps) if length > 0]
        return max(1, math.ceil(min(lengths) / 9)) if lengths else 10

    def _has_time(self) -> bool:
        training_time = time.perf_counter() - self._start_time
        return self._drawing_time + self._snapshot_time <= self.max_share * training_time

    def _queue(self, trainer: Trainer) -> None:
        """Queue the latest snapshot for drawing, once."""
        if trainer.is_global_zero and self._latest is not None and self._latest is not self._last_queued:
            self._pending.append(self._latest)
            self._last_queued = self._latest

    def _draw_all(self, trainer: Trainer) -> None:
        self._queue(trainer)
        while self._pending:
            self._draw_next(trainer)

    def _draw_next(self, trainer: Trainer) -> None:
        """Draw the oldest snapshot of the queue."""
        start = time.perf_counter()
        snapshot = self._pending.pop(0)
        with self.optional(f"{snapshot.stage} plots"):
            self._draw(trainer, snapshot)
        self._snapshot_time = time.perf_counter() - start
        self._drawing_time += self._snapshot_time

    def _draw(self, trainer: Trainer, snapshot: Snapshot) -> None:
        writers = [logger.experiment for logger in tensorboard_loggers(trainer)]
        for name, angles in snapshot.angles_by_stage().items():
            if len(angles := angles[angles.isfinite()]):
                for writer in writers:
                    writer.add_histogram(f"angles/{name}", angles, snapshot.step, bins=ANGLE_BINS)
        stage = list(snapshot.angles_by_stage())[-1]
        if stage not in self._baselines:
            self._baselines[stage] = baseline_angles(self._folder.parent, snapshot.margin, stage)
        snapshot.baseline = self._baselines[stage]
        pictures = []
        for plot in draw(snapshot):
            name = f"{snapshot.stage}/{plot.name}"
            with self.optional(name):
                if self.save:
                    self._save(snapshot, plot)
                for logger in figure_loggers(trainer):
                    log_figure(logger, name, plot.figure, snapshot.step)
                if self.html:
                    pictures.append(figure_html(plot.figure, name))
        self._plots[snapshot.stage] = Section(f"{STAGES[snapshot.stage].capitalize()}: plots", "\n".join(pictures))

    def _write_page(self, trainer: Trainer) -> None:
        if not self.html or not trainer.is_global_zero:
            return
        run = self._folder.parent
        with self.optional("report.html"):
            sections = []
            for stage in ("test", "val"):
                metrics = trainer.callback_metrics.items()
                groups = labelled({name: value for name, value in metrics if name.startswith(f"{stage}/")})
                if groups:
                    title = STAGES[stage].capitalize()
                    self._metrics[stage] = [
                        Section(f"{title}: {name}", table_html((), rows)) for name, rows in groups.items()
                    ]
                sections += self._metrics.get(stage, [])
                sections += [self._plots[stage]] if stage in self._plots else []
            config = run / "config.yaml"
            if config.is_file():
                sections.append(Section("Settings", text_html(config.read_text(encoding="utf-8"))))
            sections.append(Section("Machine and versions", table_html((), machine_and_versions().items())))
            run.mkdir(parents=True, exist_ok=True)
            write_page(run / "report.html", f"Run {run}", sections)

    def _save(self, snapshot: Snapshot, plot: Plot) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        step = "" if snapshot.lambda_ is None else f"_{snapshot.step:06d}"
        path = self._folder / f"{snapshot.stage}_{plot.name}{step}"
        kind = "png" if self.save is True else str(self.save)
        with atomic_path(path.with_suffix(f".{kind}")) as part:
            plot.figure.savefig(part, format=kind)
        write_csv(path.with_suffix(".csv"), [plot.header, *plot.rows])


def _latest_angles(batches: Sequence[Tensor]) -> Tensor:
    """Return the angles of the latest samples, in memory of their own."""
    return torch.cat(list(batches))[-MAX_TRAIN_ANGLES:].clone()
