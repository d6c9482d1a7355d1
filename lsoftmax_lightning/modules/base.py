"""Base class of the modules: backbone and head, loss, training step, optimizer, annealing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.parsing import collect_init_args
from lightning.pytorch.utilities.types import (
    LRSchedulerConfig,
    LRSchedulerConfigType,
    OptimizerLRScheduler,
    OptimizerLRSchedulerConfig,
)
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import Self, override

from ..backbones import create_backbone
from ..backbones.modes import evaluation_mode
from ..callbacks import LambdaAnnealing
from ..callbacks.run_length import run_length
from ..checkpoints import check_format, saved_data_spec, stamp
from ..checkpoints import warm_start as start_from
from ..chunked_loss import is_plain_cross_entropy
from ..compat import current_datamodule, logs_this_step, schedulers_in, trainer_of
from ..data_spec import DataSpec
from ..errors import InputError, first_line
from ..heads import LSoftmaxLinear
from ..lr_schedulers import FractionalMultiStepLR
from ..schedules import AccuracyFeedback, LambdaSchedule

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""Modes of :func:`torch.compile`."""


class LSoftmaxModule(LightningModule):
    """Backbone with an L-Softmax head, and its training.

    To change one part, override :meth:`configure_model_parts`, :meth:`configure_losses`, :meth:`configure_metrics`,
    :meth:`forward_features` or :meth:`configure_optimizers`. The training and evaluation steps stay the same.
    ``__init__`` calls the first three in this order, after it has set ``num_classes``, ``margin``, ``image_shape``,
    ``backbone_args`` and ``label_smoothing``.

    ``self.hparams`` contains the arguments of ``__init__`` except objects, which a checkpoint cannot store safely.
    Arguments that a subclass adds should therefore be numbers, strings, or lists and dicts of these. On the command
    line, ``self.hparams`` contains only the arguments of the subclass, unless it takes ``**kwargs``.

    :meth:`forward` and :meth:`forward_features` do not apply the margin; only training does. The module adds
    :class:`~lsoftmax_lightning.callbacks.LambdaAnnealing`, which anneals lambda, to a Trainer without it.

    Args:
        num_classes: C, at least 2. The command line takes it from the data.
        backbone: Name of a network (see :func:`~lsoftmax_lightning.backbones.list_backbones`), or any module from
            images to features (N, D) with D in its attribute ``num_features``. A checkpoint stores a name; a module
            must be passed again: ``load_from_checkpoint(path, backbone=...)``.
        margin: m, an integer >= 1; 1 is plain softmax.
        image_shape: Channels, height and width of the images; required for a backbone given by name and for lazy
            layers. The command line takes it from the data.
        backbone_args: Further arguments of a backbone given by name.
        lambda_schedule: Schedule of lambda. Default: :class:`~lsoftmax_lightning.schedules.AccuracyFeedback`, which
            follows the training accuracy.
        optimizer: Callable from parameter groups to an optimizer. Default: the paper's SGD (section 5), with learning
            rate 0.1, momentum 0.9 and weight decay 5e-4. One-dimensional parameters (biases, normalisation layers and
            PReLU slopes) have no weight decay.
        lr_scheduler: Callable from the optimizer to a learning rate scheduler. Default: a constant learning rate. The
            milestones of a :class:`~lsoftmax_lightning.lr_schedulers.FractionalMultiStepLR` are fractions of the run.
        lr_scheduler_interval: ``step`` to step the scheduler after each optimizer step, as in the paper, or ``epoch``.
            A ``ReduceLROnPlateau`` of a validation metric is always stepped at the end of an epoch with a validation.
        label_smoothing: As in :class:`torch.nn.CrossEntropyLoss`.
        channels_last: Whether to store images and weights in the channels-last memory format.
        compile: Whether to apply :func:`torch.compile` to the backbone: True, or a mode. Evaluation always runs
            eagerly, since its batch sizes vary. A checkpoint does not store this argument.
        warm_start: File of initial weights, from a network trained with plain softmax: a Lightning checkpoint, or the
            state dict of a bare module. See :func:`~lsoftmax_lightning.checkpoints.warm_start`.

    Attributes:
        data_spec: Specification of the training data. ``fit`` takes it from the Trainer's datamodule, and a checkpoint
            contains it. With plain data loaders it is None unless you set it.
        learning_rate: Learning rate that replaces that of the optimizer, or None. Lightning's ``LearningRateFinder``
            sets it.

    Raises:
        InputError: If a setting is out of range, or the parts or ``warm_start`` do not fit together.
    """

    backbone: nn.Module
    head: LSoftmaxLinear
    learning_rate: float | None = None

    def __init__(
        self,
        num_classes: int,
        backbone: str | nn.Module,
        margin: int = 4,
        image_shape: tuple[int, int, int] | None = None,
        backbone_args: dict[str, Any] | None = None,
        lambda_schedule: LambdaSchedule = AccuracyFeedback(),  # noqa: B008 (a frozen value)
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        compile: bool | CompileMode = False,
        warm_start: str | None = None,
    ) -> None:
        super().__init__()
        self.data_spec: DataSpec | None = None
        self._loss_is_monitored = True
        self._unlogged_loss: Tensor | None = None
        # A run resumes without the file of warm_start, and compile depends on the machine.
        ignored = ["lambda_schedule", "optimizer", "lr_scheduler", "compile", "warm_start"]
        ignored += [] if isinstance(backbone, str) else ["backbone"]
        # Arguments that a subclass fixes are not its own: load_from_checkpoint would pass them to it.
        frame: Any = inspect.currentframe()
        *inner, outermost = collect_init_args(frame, [], classes=(type(self),))
        ignored += [name for args in inner for name in args if name not in outermost]
        self.save_hyperparameters(ignore=ignored)
        # Not read from hparams: under LightningCLI these have only the arguments of the subclass.
        self.num_classes, self.margin, self.label_smoothing = num_classes, margin, label_smoothing
        self.image_shape, self.backbone_args = image_shape, backbone_args
        self.lr_scheduler_interval = lr_scheduler_interval
        self._channels_last, self._compiled = channels_last, bool(compile)
        self.lambda_schedule = lambda_schedule
        # the default is a lambda, because jsonargparse reads its settings from it, but a lambda does not pickle
        self._optimizer = _paper_sgd if optimizer is _DEFAULT_OPTIMIZER else optimizer
        self._lr_scheduler = lr_scheduler
        self.configure_model_parts(backbone)
        self._initialize_lazy_layers()
        self.configure_losses()
        self.configure_metrics()
        if warm_start is not None:
            start_from(self, warm_start)
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        if compile:
            self.backbone.compile(mode="default" if compile is True else compile)

    def configure_model_parts(self, backbone: str | nn.Module) -> None:
        """Set ``self.backbone`` and ``self.head``.

        Args:
            backbone: Backbone as passed to ``__init__``.

        Raises:
            InputError: If the parts do not fit together.
        """
        if isinstance(backbone, str):
            if self.image_shape is None:
                raise InputError(
                    f"image_shape: is required for the backbone {backbone!r}, got None; pass image_shape=(channels, "
                    "height, width). On the command line, the datamodule must have image_shape and num_classes."
                )
            backbone = create_backbone(backbone, self.image_shape, **(self.backbone_args or {}))
        num_features = getattr(backbone, "num_features", None)
        if not isinstance(num_features, int):
            raise InputError(
                f"backbone: {type(backbone).__name__} must have an int attribute num_features, the number of its "
                f"features, got {num_features!r}; set it in its __init__."
            )
        self.backbone = backbone
        self.head = LSoftmaxLinear(num_features, self.num_classes, self.margin)

    def _initialize_lazy_layers(self) -> None:
        """Give lazy layers the shapes that the optimizer and a checkpoint need, by a forward pass of one image."""
        if not self._has_lazy_layers() or self.image_shape is None:
            return
        try:
            with torch.no_grad(), evaluation_mode(self):
                self.forward_features(torch.zeros(1, *self.image_shape))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"backbone: {type(self.backbone).__name__} does not accept images of "
                f"{tuple(self.image_shape)}: {first_line(error)}"
            ) from error

    def _has_lazy_layers(self) -> bool:
        return any(is_lazy(value) for value in (*self.parameters(), *self.buffers()))

    def configure_losses(self) -> None:
        """Set ``self.criterion``, a loss of logits (N, C) and classes (N,).

        The logits carry the margin in training only. The tensors of the criterion, such as the ``weight`` of
        :class:`torch.nn.CrossEntropyLoss`, stay in float32 with ``bf16-true`` and ``16-true``, like the logits.

        Raises:
            InputError: If ``label_smoothing`` is out of range.
        """
        if not 0 <= self.label_smoothing <= 1:
            raise InputError(
                f"label_smoothing: must be from 0 to 1, got {self.label_smoothing}; the usual value is 0.1."
            )
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the tensors of ``criterion`` in float32, like the logits, if the module is converted to half precision.

        ``to``, ``half`` and ``bfloat16`` call ``_apply``; :class:`torch.nn.RNN` overrides it as well.
        """
        before = [tensor.detach() for tensor in self._criterion_tensors()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor, old in zip(self._criterion_tensors(), before, strict=True):
            if tensor.is_floating_point() and tensor.element_size() < 4:
                tensor.data = (tensor if old.is_meta else old).to(tensor.device, torch.float32)
        return self

    def _criterion_tensors(self) -> list[Tensor]:
        criterion = getattr(self, "criterion", None)
        return [*criterion.parameters(), *criterion.buffers()] if isinstance(criterion, nn.Module) else []

    def configure_metrics(self) -> None:
        """Set ``self.train_metrics``, metrics of the predictions of :meth:`margin_loss` and classes (N,)."""
        self.train_metrics = MetricCollection(
            # the head checks the classes; this check would synchronise the device
            {"acc": MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)},
            prefix="train/",
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute features (N, D) of images (N, channels, height, width)."""
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.training or not self._compiled:
            features: Tensor = self.backbone(x)
        else:  # eager, to avoid a compilation for this mode and for each batch size
            with torch.compiler.set_stance("force_eager"):
                features = self.backbone(x)
        return features

    def embed(self, images: Tensor) -> Tensor:
        """Compute embeddings (N, D) for verification, prediction and export; the features unless overridden.

        Prediction and export classify the embeddings, ``head(embed(images))``; validation and test use ``forward``.
        """
        return self.forward_features(images)

    def forward(self, x: Tensor) -> Tensor:
        """Compute plain logits (N, C) of images (N, channels, height, width)."""
        logits: Tensor = self.head(self.forward_features(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of the margin logits, and update the metrics of the plain logits.

        ``train/loss`` of rank 0 is logged every ``log_every_n_steps`` steps and at the end of an epoch. If a callback
        or scheduler monitors it, the mean over ranks is logged at every step. Logging takes a third of a millisecond.
        """
        x, target = batch
        loss, plain = self.margin_loss(self.forward_features(x), target)
        trainer = trainer_of(self)
        self._unlogged_loss = None
        if self._loss_is_monitored or trainer is None or trainer.is_last_batch or logs_this_step(trainer):
            self.log("train/loss", loss, sync_dist=self._loss_is_monitored)
        else:
            self._unlogged_loss = loss.detach()
        if not any(metric.update_called for metric in self.train_metrics.values(copy_state=False)):
            # Once an epoch, because a call takes half a millisecond; Lightning computes and resets them at its end.
            self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        self.train_metrics.update(plain, target)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the loss on the progress bar every ``log_every_n_steps`` steps and at the end of an epoch.

        ``prog_bar=True`` would synchronise the device at every step.
        """
        if self.trainer.should_stop and self._unlogged_loss is not None:  # loggers get the metrics of the last step
            self.log("train/loss", self._unlogged_loss)  # a monitored loss is logged in training_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.trainer.is_last_batch or (every and self.trainer.global_step % every == 0):
            metrics = self.trainer.callback_metrics
            if "train/loss" in metrics:
                self.trainer.progress_bar_metrics["train/loss"] = float(metrics["train/loss"])

    def margin_loss(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of the margin logits, and the predictions for ``train_metrics``.

        Args:
            features: x, (N, D).
            target: Class of each sample, (N,), an integer type.

        Returns:
            The loss, and the plain logits (N, C). With many classes, if ``criterion`` is plain cross-entropy, the loss
            is computed in chunks, and the predicted classes (N,) are returned instead of logits.
        """
        if self.head.uses_chunked_loss and is_plain_cross_entropy(self.criterion):
            chunked = self.head.cross_entropy(features, target, self.criterion.label_smoothing)
            return chunked.loss, chunked.prediction
        logits, plain = self.head.margin_and_plain_logits(features, target)
        return self.criterion(logits, target.long()), plain

    def compared_data(self, training: bool) -> DataSpec:
        """Return the specification that data must match.

        Args:
            training: Whether the training resumes on the data; otherwise the network is evaluated on them.
        """
        return self.data_spec or DataSpec()

    def check_data(self, datamodule: Any, training: bool = False) -> None:
        """Check that the data of a datamodule match the training data.

        Args:
            datamodule: Datamodule, or None for no check. Attributes that it does not have are not compared.
            training: Whether the training resumes on its data.

        Raises:
            InputError: If the data differ.
        """
        self.compared_data(training).check(DataSpec.from_datamodule(datamodule))

    @override
    def on_fit_start(self) -> None:
        self._store_data_spec()

    def _store_data_spec(self) -> None:
        """Store the specification of the Trainer's data, unless it is empty."""
        trainer = trainer_of(self)
        spec = DataSpec.from_datamodule(trainer and current_datamodule(trainer))
        if any(spec):
            self.data_spec = spec

    @override
    def on_validation_start(self) -> None:
        if self.trainer.state.fn != "fit":
            self.check_data(current_datamodule(self.trainer))

    on_test_start = on_predict_start = on_validation_start

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and the scheduler, if any.

        The optimizer has two parameter groups: one-dimensional parameters have no weight decay.

        Raises:
            InputError: If a setting is invalid, or lazy layers have no shapes yet.
        """
        if self._has_lazy_layers():
            raise InputError(
                f"image_shape: is required for the lazy layers of {type(self.backbone).__name__}, got None; pass "
                "image_shape=(channels, height, width)."
            )
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        try:
            optimizer = self._optimizer(groups)
            for group in optimizer.param_groups if self.learning_rate is not None else ():
                group["lr"] = self.learning_rate
            scheduler = self._lr_scheduler and self._lr_scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer or lr_scheduler: has an invalid setting: {error}") from error
        if scheduler is None:
            return optimizer
        monitor = getattr(scheduler, "monitor", "val/loss")
        config = LRSchedulerConfigType(scheduler=scheduler, interval=self.lr_scheduler_interval, monitor=monitor)
        if isinstance(scheduler, ReduceLROnPlateau) and monitor.startswith("val/"):
            config["interval"] = "epoch"
            trainer = trainer_of(self)
            config["frequency"] = (trainer and trainer.check_val_every_n_epoch) or 1
        return OptimizerLRSchedulerConfig(optimizer=optimizer, lr_scheduler=config)

    def on_train_start(self) -> None:
        """Set the length of the run in a :class:`~lsoftmax_lightning.lr_schedulers.FractionalMultiStepLR`.

        In ``configure_optimizers``, Lightning would create the data loaders to compute the length, and then ignore
        their state in the checkpoint (https://github.com/Lightning-AI/pytorch-lightning/issues/20550).

        Raises:
            InputError: If the length of the run is unknown, the scheduler is not stepped once per optimizer step, or a
                ``OneCycleLR`` has fewer steps than the run, or a ``ReduceLROnPlateau`` is stepped before validation.
        """
        schedulers, callbacks = self.trainer.lr_scheduler_configs, self.trainer.callbacks  # type: ignore[attr-defined]
        self.train_metrics.reset()  # of an interrupted training
        self._loss_is_monitored = any(
            getattr(each, "monitor", None) == "train/loss" for each in [*schedulers, *callbacks]
        )
        for config in schedulers:
            self._check_one_cycle(config)
            self._check_plateau(config)
            if not isinstance(config.scheduler, FractionalMultiStepLR):
                continue
            if (config.interval, config.frequency) != ("step", 1):
                raise InputError(
                    "lr_scheduler_interval: FractionalMultiStepLR must be stepped once per optimizer step, got "
                    f"interval {config.interval!r} and frequency {config.frequency}; set the interval to 'step' and "
                    "the frequency to 1."
                )
            if config.scheduler.follows_run:
                # they differ after a second call of fit, and in checkpoints of a MultiStepLR that counts epochs
                config.scheduler.last_epoch = self.trainer.global_step
                config.scheduler.set_total_steps(run_length(self.trainer))

    def _check_one_cycle(self, config: LRSchedulerConfig) -> None:
        for scheduler in schedulers_in(config.scheduler):
            if not isinstance(scheduler, OneCycleLR):
                continue
            length = run_length(self.trainer) if config.interval == "step" else self.trainer.max_epochs
            steps = (length or 0) // config.frequency
            if scheduler.total_steps < steps < math.inf:
                cure = f"set total_steps={steps:g}"
                if self.trainer.ckpt_path:
                    cure = "the value in the checkpoint; do not lengthen the run, or start a new one with warm_start"
                raise InputError(
                    f"total_steps: OneCycleLR must have at least the {steps:g} steps of the run, got "
                    f"{scheduler.total_steps}; {cure}."
                )

    def _check_plateau(self, config: LRSchedulerConfig) -> None:
        trainer: Any = self.trainer
        interval = trainer.val_check_batch or 0  # None for a time
        batches = trainer.num_training_batches
        monitors_validation = config.reduce_on_plateau and str(config.monitor).startswith("val/")
        if monitors_validation and trainer.check_val_every_n_epoch is None and interval > batches:
            raise InputError(
                f"lr_scheduler: ReduceLROnPlateau needs {config.monitor} at the end of an epoch, after {batches} "
                f"batches, got val_check_interval {interval}; set it to at most {batches}."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the release, the format and the specification of the training data to the checkpoint."""
        if self.data_spec is None:  # the training ran in other processes
            self._store_data_spec()
        stamp(checkpoint, self.data_spec)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject a checkpoint of a later format, or with other training data than the run that resumes from it.

        Raises:
            InputError: In these cases.
        """
        check_format(checkpoint)
        self.data_spec = saved_data_spec(checkpoint) or self.data_spec
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit":
            self.check_data(current_datamodule(trainer), training=True)

    def configure_callbacks(self) -> list[Callback]:
        """Return a ``LambdaAnnealing``, unless the Trainer has one."""
        configured = any(isinstance(callback, LambdaAnnealing) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if configured else [LambdaAnnealing()]


_DEFAULT_OPTIMIZER = inspect.signature(LSoftmaxModule).parameters["optimizer"].default


def _paper_sgd(params: Any) -> SGD:
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)
