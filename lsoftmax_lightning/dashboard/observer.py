"""Observation of the features and logits that pass through the head, so that nothing is computed twice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from ..compat import logs_this_step
from ..errors import first_line
from ..functional import plain_logits
from ..heads import HeadCall, LSoftmaxLinear


def head_of(pl_module: LightningModule) -> LSoftmaxLinear | None:
    """Return the ``head`` of a module if it is an :class:`LSoftmaxLinear`, compiled or not; otherwise None."""
    head: LSoftmaxLinear | None = getattr(pl_module, "head", None)
    return head if hasattr(head, "observed") else None


class HeadObserver(Callback):
    """Base class that observes features and plain logits of the module's head, batch by batch.

    :meth:`observe_training` receives the training batches of logged steps, :meth:`observe_evaluation` all batches of
    validation and test. A batch must be (images, classes, ...); other batches, and batches for which the head is not
    called, are skipped. Steps are counted for a single optimiser. If the ``head`` of the module is not a
    :class:`~lsoftmax_lightning.LSoftmaxLinear`, the observer warns and observes nothing.

    Attributes:
        is_observing: Whether the module has such a head.
    """

    is_observing = False
    _hook: RemovableHandle | None = None
    _call: HeadCall | None = None
    _batch: Any = None
    _skipped: frozenset[str] = frozenset()

    def observe_training(self, trainer: Trainer, head: LSoftmaxLinear, features: Tensor, target: Tensor) -> None:
        """Receive a training batch whose step will be logged, before the step.

        Args:
            trainer: The Trainer.
            head: The head of its module.
            features: x, ``(N, D)``.
            target: Class of each sample, int64, ``(N,)``.
        """

    def observe_evaluation(
        self, head: LSoftmaxLinear, images: Any, features: Tensor, logits: Tensor, target: Tensor
    ) -> None:
        """Receive a batch of a validation or test; ``logits`` are plain logits, ``(N, C)``."""

    def observed_head(self, pl_module: LightningModule) -> LSoftmaxLinear | None:
        """Return the head of the module; None if it is not observed."""
        return head_of(pl_module) if self.is_observing else None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.detach()  # a failed run was not torn down
        if stage == "fit":
            self._skipped = frozenset()
        head = head_of(pl_module)
        self.is_observing = head is not None
        if head is None:
            rank_zero_warn(
                f"{type(self).__name__} shows nothing: {type(pl_module).__name__} has no LSoftmaxLinear as its `head`."
            )
        else:
            self._hook = head.observed.register_forward_hook(self._forward_hook)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.detach()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._call = batch, None

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not logs_this_step(trainer):
            return
        head, observed = self.observed_head(pl_module), self._take_call(self._batch)
        if head is not None and observed is not None:
            call, target = observed
            with torch.no_grad():
                self.observe_training(trainer, head, call.features, target)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._call = None

    on_test_batch_start = on_validation_batch_start

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        head, observed = self.observed_head(pl_module), self._take_call(batch)
        if head is not None and observed is not None:
            call, target = observed
            logits = call.plain_logits
            if logits is None:
                logits = plain_logits(call.features, head.full_weight)
            self.observe_evaluation(head, batch[0], call.features, logits, target)

    on_test_batch_end = on_validation_batch_end

    @contextmanager
    def optional(self, name: str, collective: bool = False) -> Iterator[None]:
        """Suppress errors of the block, so that the run continues; each fit warns once for each ``name``.

        Args:
            name: Name for the warning.
            collective: Whether ranks exchange data in the block. An error then ends a run on several ranks, because the
                other ranks would wait forever.
        """
        try:
            yield
        except Exception as error:  # of any library that draws or writes
            if collective and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise
            if name not in self._skipped:
                warnings.warn(
                    f"{type(self).__name__}: {name} left out because of {type(error).__name__}: {first_line(error)}; "
                    "the run continues without.",
                    stacklevel=3,
                )
            self._skipped |= {name}

    def detach(self) -> None:
        """Stop observing, and release observed tensors."""
        if self._hook is not None:
            self._hook.remove()
        self._call = self._batch = self._hook = None

    def _forward_hook(self, observed: nn.Module, args: tuple[HeadCall], output: HeadCall) -> None:
        logits = output.plain_logits
        self._call = HeadCall(output.features.detach(), None if logits is None else logits.detach())

    def _take_call(self, batch: Any) -> tuple[HeadCall, Tensor] | None:
        """Return the last call of the head and the classes of its batch, and forget the call."""
        call, self._call = self._call, None
        target = classes_of(batch)
        if call is None or target is None or target.shape != call.features.shape[:1]:
            return None
        return call, target.long()


def tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    """Return the TensorBoard loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def classes_of(batch: Any) -> Tensor | None:
    """Return the classes of a batch (images, classes, ...); None for any other batch."""
    if isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    return None
