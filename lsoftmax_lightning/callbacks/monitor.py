"""Scalars that explain a training with a margin, and their place on TensorBoard."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Trainer
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from ..geometry import effective_margin, evenly_spaced, segment_counts, separation, target_angles
from ..metrics import ClassAngles, MeanLoss
from ..schedules import LambdaSchedule
from ..seeds import global_seed
from .annealing import LambdaAnnealing
from .observer import HeadObserver, classes_of, tensorboard_loggers


def _layout(pairs: bool, follows_accuracy: bool) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Of the tab of custom scalars: categories of charts, each of the tags that its regular expressions match."""
    charts = {
        "Learning": {
            "loss with the margin": ["train/loss$", "val/margin_loss$"],
            "plain cross-entropy": ["train/cross_entropy$", "val/loss$"],
            "accuracy": ["train/acc$", "val/acc$"],
        },
        "Verification": {
            "area under the ROC curve": ["val/auc$"],
            "equal error rate": ["val/eer$"],
            "accepted at few false accepts": ["val/tar_at_far_"],
        },
        "Annealing": {
            "lambda": ["lambda$"],
            "accuracy with the margin, which sets lambda": ["train/margin_acc$"],
            "effective margin": ["effective_margin$"],
            "learning rate": ["lr$"],
        },
        "Compactness": {
            "angle of a sample to its class weight, degrees": ["train/angle$", "val/angle$"],
            "share of samples in segment k": ["train/segment_", "val/segment_"],
            "length of a feature": ["train/feature_norm$", "val/feature_norm$"],
        },
        "Separability": {
            "angle between class weights": ["val/weight_angle_"],
            "angle between class centres": ["val/centre_angle_"],
        },
        "Speed": {"images a second": ["images_per_second$"]},
    }
    if not follows_accuracy:
        del charts["Annealing"]["accuracy with the margin, which sets lambda"]
    if pairs:
        del charts["Separability"]["angle between class centres"]
    else:
        del charts["Verification"]
    return {
        category: {title: ("Multiline", tags) for title, tags in content.items()}
        for category, content in charts.items()
    }


class MarginMonitor(HeadObserver):
    """Logs what shows whether a margin does its work, for any module with an L-Softmax ``head``.

    Every ``log_every_n_steps`` training steps, of that batch: ``train/cross_entropy`` (the plain one, beside the
    margin's ``train/loss``), ``train/angle``, ``train/feature_norm``, ``train/segment_k``, ``effective_margin``
    (:func:`~lsoftmax_lightning.geometry.effective_margin`), ``lr`` (of the first parameter group) and
    ``images_per_second`` (of all devices, validation left out). But for the last, and ``train/cross_entropy`` of a head
    that is sharded by class, they are of the first process's share.

    In validation ``val/weight_angle_mean``, ``_nearest`` and ``_min``, the
    :func:`~lsoftmax_lightning.geometry.separation` of the class weights, and where the images are of
    these classes also ``val/margin_loss`` and the figures of :class:`~lsoftmax_lightning.metrics.ClassAngles`, as
    ``val/angle`` and so on. In testing the same, but for the loss.

    With a TensorBoardLogger the tab of custom scalars is laid out, and the HParams tab gets a row with margin, lambda
    settings, backbone, seed, and validation and test accuracy.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begins to listen."""
        super().setup(trainer, pl_module, stage)
        self._measuring = False
        if self.is_observing:
            for logger in tensorboard_loggers(trainer):
                logger._default_hp_metric = False  # it would be -1 for good, beside what on_fit_start names

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Lays out TensorBoard."""
        if not self.is_observing:
            return
        pairs = _has_pairs(trainer, "val")
        metrics = dict.fromkeys(["val/acc", "test/acc", "train/angle" if pairs else "val/angle"])
        for logger in tensorboard_loggers(trainer):
            if trainer.is_global_zero:
                follows_accuracy = getattr(_schedule(trainer, pl_module), "accuracy_decay", None) is not None
                logger.experiment.add_custom_scalars(_layout(pairs, follows_accuracy))
                # the tab finds the values by these names; Lightning's way would log some now, before there are any
                with self.optional("HParams"):
                    for summary in hparams(_settings(trainer, pl_module), metrics):  # type: ignore[no-untyped-call]
                        logger.experiment._get_file_writer().add_summary(summary)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the clock."""
        self._restart_clock()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the clock again."""
        self._restart_clock()

    def observe_training(self, trainer: Trainer, pl_module: Any, features: Tensor, target: Tensor) -> None:
        """Takes the figures of a step."""
        head = pl_module.head
        angles = target_angles(features, head.class_weights(target))
        shares = segment_counts(angles, head.margin) / len(angles)
        self._step_number = trainer.global_step
        self._step = {
            "train/cross_entropy": head.plain_cross_entropy(features, target),
            "train/angle": angles.mean(),
            "train/feature_norm": torch.linalg.vector_norm(features.float(), dim=1).mean(),
            **{f"train/segment_{k}": share for k, share in enumerate(shares)},
            "effective_margin": effective_margin(head.margin, head.lambda_),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: object, batch: Any, batch_idx: int) -> None:
        """Logs the figures of the step, once it is taken."""
        if (target := classes_of(batch)) is not None:
            self._images += len(target) * trainer.world_size
        if self._step and trainer.global_step > self._step_number:  # it was taken
            figures = convert_tensors_to_scalars(self._step)  # waits for the device
            _log(trainer, figures | {"images_per_second": self._images / (time.perf_counter() - self._since)})
            self._restart_clock()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begins anew."""
        self._begin(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begins anew."""
        self._begin(trainer, pl_module, "test")

    def observe_evaluation(self, pl_module: Any, images: Any, features: Tensor, logits: Tensor, target: Tensor) -> None:
        """Takes a batch of a validation or a test."""
        if self._measuring:
            self._angles.update(features, pl_module.head.full_weight, target)
            margin_logits = pl_module.head.apply_margin(logits, features, target)
            self._margin_loss.update(F.cross_entropy(margin_logits, target), len(target))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the figures of a validation."""
        if not self.is_observing or trainer.sanity_checking:
            return
        figures = self._figures(pl_module, "val")
        if trainer.state.fn == TrainerFn.FITTING:
            if "val/angle" in figures:  # elsewhere nobody has set lambda
                figures["val/margin_loss"] = self._margin_loss.compute()
            trainer.callback_metrics.update(figures)  # for what monitors one
            _log(trainer, convert_tensors_to_scalars(figures))
        else:
            pl_module.log_dict(figures, sync_dist=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the figures of a test."""
        if self.is_observing:
            pl_module.log_dict(self._figures(pl_module, "test"), sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the clock again, where the validation was amid an epoch of training."""
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._images, self._since, self._step = 0, time.perf_counter(), {}

    def _begin(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._measuring = self.is_observing and not trainer.sanity_checking and not _has_pairs(trainer, stage)
        if self._measuring:
            head = pl_module.head
            self._angles = ClassAngles(head.num_classes, head.in_features, head.margin).to(pl_module.device)
            self._margin_loss = MeanLoss().to(pl_module.device)

    def _figures(self, pl_module: Any, stage: str) -> dict[str, Tensor]:
        head = pl_module.head
        separate = separation(head.class_weights(evenly_spaced(head.num_classes).to(pl_module.device)))
        figures = {f"weight_angle_{name}": angle for name, angle in separate._asdict().items()}
        if self._measuring:
            figures |= self._angles.compute()
        return {f"{stage}/{name}": figure for name, figure in figures.items()}


def _log(trainer: Trainer, figures: dict[str, Any]) -> None:
    """Gives figures to the loggers as they are; the bookkeeping of ``pl_module.log`` takes longer than they do."""
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step - 1)  # where Lightning puts train/loss and val/loss


def _has_pairs(trainer: Trainer, stage: str) -> bool:
    """Whether the images of a stage are of pairs, not of the classes of the head."""
    return hasattr(trainer.datamodule, f"{stage}_pairs")  # type: ignore[attr-defined]


def _schedule(trainer: Trainer, pl_module: Any) -> LambdaSchedule | None:
    """Returns the schedule of lambda, if the Trainer anneals it."""
    annealing = (callback for callback in trainer.callbacks if isinstance(callback, LambdaAnnealing))  # type: ignore[attr-defined]
    return next((callback.schedule_for(pl_module) for callback in annealing), None)


def _settings(trainer: Trainer, pl_module: Any) -> dict[str, bool | float | str]:
    """What tells one run from another; named so that the first five, which TensorBoard shows at once, matter most."""
    schedule = _schedule(trainer, pl_module)
    plain = {name: value for name, value in pl_module.hparams.items() if isinstance(value, bool | int | float | str)}
    optimizer = {
        name: value for name, value in trainer.optimizers[0].defaults.items() if name in ("lr", "weight_decay")
    }
    return {
        "backbone": plain.pop("backbone", type(getattr(pl_module, "backbone", None)).__name__),
        "lambda": repr(schedule),
        "lambda_min": getattr(schedule, "lambda_min", "none"),
        "margin": plain.pop("margin", pl_module.head.margin),
        "seed": "none" if (seed := global_seed()) is None else str(seed),
        **{f"settings/{name}": value for name, value in (plain | optimizer).items() if not name.startswith("_")},
    }
