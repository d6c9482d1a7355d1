"""The callback that logs the scalars of a training with a margin, and lays out TensorBoard."""

from __future__ import annotations

import time
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from typing_extensions import override

from ..compat import add_summary, current_datamodule, disable_default_hp_metric, log_scalars
from ..geometry import target_angles
from ..heads import LSoftmaxLinear
from ..metrics import ANGLE_COUNTS, AngleHistogram, ClassAngles, MeanLoss, loss_weight
from ..pairs import pairs_of
from ..schedules import LambdaSchedule
from ..seeds import global_seed
from .observer import HeadObserver, classes_of, tensorboard_loggers
from .scalars import layout, training_scalars, weight_scalars


class MarginMonitor(HeadObserver):
    """Logs scalars that show whether the margin works, for any module with an L-Softmax ``head``.

    Every ``log_every_n_steps`` training steps, of that batch: ``train/cross_entropy`` (without the margin that
    ``train/loss`` has), ``train/angle``, ``train/feature_norm``, ``train/segment_k``, ``effective_margin``
    (:func:`~lsoftmax_lightning.geometry.effective_margin`), ``lr`` (of the first parameter group) and
    ``images_per_second`` (of all devices, without validation). They are of the samples of rank 0, except for
    ``images_per_second`` and, with a class-sharded head, ``train/cross_entropy``.

    In validation ``val/weight_angle_mean``, ``_nearest`` and ``_min``, the
    :func:`~lsoftmax_lightning.geometry.separation` of the class weights. If validation is on the classes of the head,
    also the metrics of :class:`~lsoftmax_lightning.metrics.ClassAngles`, as ``val/angle`` and so on, and
    ``val/margin_loss``, computed with the ``criterion`` of a module with ``configure_losses``, otherwise with
    cross-entropy. In a test the same, without the loss.

    A checkpoint that is saved right after a validation gets the histogram of the angles of the validation images to
    their predicted class (:class:`~lsoftmax_lightning.metrics.AngleHistogram`), from which
    ``predictions.max_angle_quantile`` takes its threshold.

    A TensorBoardLogger also gets the layout of the Custom Scalars tab, and a row in the HParams tab with margin, lambda
    settings, backbone, seed, and validation and test accuracy.
    """

    _angle_counts: Tensor | None = None
    _counted_step = 0  # global step of the validation that counted them

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._angle_counts is not None and self._counted_step == trainer.global_step:
            # Lightning would warn a Trainer without this callback of a `state_dict`
            checkpoint[ANGLE_COUNTS] = self._angle_counts

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._angle_counts, self._counted_step = checkpoint.get(ANGLE_COUNTS), checkpoint["global_step"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._measuring = False
        if stage == "fit":  # the callback may have observed another training; a checkpoint is loaded later
            self._angle_counts = None
        if self.is_observing:
            for logger in tensorboard_loggers(trainer):
                disable_default_hp_metric(logger)  # on_fit_start names the metrics

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        head = self.observed_head(pl_module)
        if head is None or not trainer.is_global_zero:
            return
        schedule = _schedule(trainer, pl_module)
        has_pairs = pairs_of(current_datamodule(trainer), "val") is not None
        follows_accuracy = getattr(schedule, "accuracy_decay", None) is not None
        metrics = dict.fromkeys(["val/acc", "test/acc", "train/angle" if has_pairs else "val/angle"])
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_custom_scalars(layout(has_pairs, follows_accuracy))
            # the tab finds the values by these names; Lightning's way would log some now, before there are any
            with self.optional("HParams"):
                for summary in hparams(_settings(trainer, pl_module, head, schedule), metrics):  # type: ignore[no-untyped-call]
                    add_summary(logger, summary)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart_clock()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart_clock()

    @override
    def observe_training(self, trainer: Trainer, head: LSoftmaxLinear, features: Tensor, target: Tensor) -> None:
        self._pending_step = trainer.global_step
        self._pending = training_scalars(head, features, target)
        self._pending["lr"] = trainer.optimizers[0].param_groups[0]["lr"]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        if (target := classes_of(batch)) is not None:
            self._images += len(target) * trainer.world_size
        if self._pending and trainer.global_step > self._pending_step:  # the step was taken
            values = convert_tensors_to_scalars(self._pending)  # waits for the device
            values["images_per_second"] = self._images / (time.perf_counter() - self._clock_start)
            log_scalars(trainer, values)
            self._restart_clock()

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, pl_module, "val")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, pl_module, "test")

    @override
    def observe_evaluation(
        self, head: LSoftmaxLinear, images: Any, features: Tensor, logits: Tensor, target: Tensor
    ) -> None:
        if self._measuring:
            self._angles.update(features, head.full_weight, target)
            self._predicted_angles.update(target_angles(features, head.full_weight[logits.argmax(dim=1)]))
            margin_logits = head.apply_margin(logits, features, target)
            self._margin_loss.update(self._criterion(margin_logits, target), loss_weight(self._criterion, target))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        head = self.observed_head(pl_module)
        if head is None or trainer.sanity_checking:
            return
        values = self._evaluation_scalars(head, "val")
        if trainer.state.fn == TrainerFn.FITTING:
            if "val/angle" in values:  # outside of a fit, lambda was never set
                values["val/margin_loss"] = self._margin_loss.compute()
                self._angle_counts, self._counted_step = self._predicted_angles.compute().cpu(), trainer.global_step
            trainer.callback_metrics.update(values)  # for callbacks that monitor one
            log_scalars(trainer, convert_tensors_to_scalars(values))
        else:
            pl_module.log_dict(values, sync_dist=True)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        head = self.observed_head(pl_module)
        if head is not None:
            pl_module.log_dict(self._evaluation_scalars(head, "test"), sync_dist=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart_clock()  # a validation within an epoch is no training time

    def _restart_clock(self) -> None:
        self._images = 0
        self._clock_start = time.perf_counter()
        self._pending = {}

    def _start_evaluation(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        head = self.observed_head(pl_module)
        has_pairs = pairs_of(current_datamodule(trainer), stage) is not None
        self._measuring = head is not None and not trainer.sanity_checking and not has_pairs
        if head is not None and self._measuring:
            self._angles = ClassAngles(head.num_classes, head.in_features, head.margin).to(pl_module.device)
            self._predicted_angles = AngleHistogram().to(pl_module.device)
            self._margin_loss = MeanLoss().to(pl_module.device)
            # only LSoftmaxModule defines the arguments of its criterion
            has_criterion = hasattr(pl_module, "configure_losses") and hasattr(pl_module, "criterion")
            self._criterion: Any = pl_module.criterion if has_criterion else F.cross_entropy

    def _evaluation_scalars(self, head: LSoftmaxLinear, stage: str) -> dict[str, Tensor]:
        values = weight_scalars(head)
        if self._measuring:
            values |= self._angles.compute()
        return {f"{stage}/{name}": value for name, value in values.items()}


@runtime_checkable
class _Annealing(Protocol):
    """A callback that sets lambda, such as ``LambdaAnnealing``, whose room is above this one."""

    def schedule_for(self, pl_module: Any) -> LambdaSchedule: ...


def _schedule(trainer: Trainer, pl_module: LightningModule) -> LambdaSchedule | None:
    """Return the schedule of lambda, if the Trainer anneals it."""
    annealing = (callback for callback in trainer.callbacks if isinstance(callback, _Annealing))  # type: ignore[attr-defined]
    return next((callback.schedule_for(pl_module) for callback in annealing), None)


def _settings(
    trainer: Trainer, pl_module: LightningModule, head: LSoftmaxLinear, schedule: LambdaSchedule | None
) -> dict[str, bool | float | str]:
    """Return the settings of the run; TensorBoard shows the first five by name at once, so they matter most."""
    plain = {name: value for name, value in pl_module.hparams.items() if isinstance(value, bool | int | float | str)}
    optimizer = {
        name: value for name, value in trainer.optimizers[0].defaults.items() if name in ("lr", "weight_decay")
    }
    return {
        "backbone": plain.pop("backbone", type(getattr(pl_module, "backbone", None)).__name__),
        "lambda": repr(schedule),
        "lambda_min": getattr(schedule, "lambda_min", "none"),
        "margin": plain.pop("margin", head.margin),
        "seed": "none" if (seed := global_seed()) is None else str(seed),
        **{f"settings/{name}": value for name, value in (plain | optimizer).items() if not name.startswith("_")},
    }
