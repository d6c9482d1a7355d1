"""Features and logits, read where they pass through the head, so that nothing is computed twice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..errors import first_line
from ..functional import plain_logits


class HeadListener(Callback):
    """Gives a subclass what the head of the module was given, and in an evaluation its plain logits, batch by batch.

    Of training, the batches of those steps that are logged, to :meth:`read_training`; of validation and test all of
    them, to :meth:`read_evaluation`. Batches are (images, classes, ...); of others, or where the head is not asked,
    nothing is read. Steps are counted as those of a single optimiser. A module without an
    :class:`~lsoftmax_lightning.LSoftmaxLinear` as its ``head`` gives nothing, with a warning.

    Attributes:
        listening: Whether there is a head.
    """

    listening = False
    _handle: RemovableHandle | None = None
    _last: tuple[Tensor, Tensor | None] | None = None
    _batch: Any = None
    _left_out: frozenset[str] = frozenset()

    def read_training(self, trainer: Trainer, pl_module: Any, features: Tensor, target: Tensor) -> None:
        """Takes a batch of a step that is to be logged, before the step.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            features: x, [N, D].
            target: Class of each sample, int64 [N].
        """

    def read_evaluation(self, pl_module: Any, images: Any, features: Tensor, logits: Tensor, target: Tensor) -> None:
        """Takes a batch of a validation or a test; ``logits`` are the plain ones, [N, C]."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begins to listen."""
        self._stop()  # a run that failed was not torn down
        head: Any = getattr(pl_module, "head", None)
        self.listening = hasattr(head, "apply_margin")
        if self.listening:
            self._handle = head.register_forward_hook(self._hear, with_kwargs=True)
        else:
            rank_zero_warn(
                f"{type(self).__name__} shows nothing: {type(pl_module).__name__} has no LSoftmaxLinear as its `head`."
            )

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Leaves the head alone."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves the head alone."""
        self._stop()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remembers the classes."""
        self._batch, self._last = batch, None

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Reads a training batch, while the weights are those that it met."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0 and (taken := self._take(self._batch)):
            features, _, target = taken
            with torch.no_grad():
                self.read_training(trainer, pl_module, features, target)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Forgets the batch before."""
        self._last = None

    on_test_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: object, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Reads a batch."""
        if taken := self._take(batch):
            features, logits, target = taken
            if logits is None:
                logits = plain_logits(features, pl_module.head.full_weight)
            self.read_evaluation(pl_module, batch[0], features, logits, target)

    on_test_batch_end = on_validation_batch_end

    @contextmanager
    def optional(self, what: str, collective: bool = False) -> Iterator[None]:
        """Leave out ``what`` if the block raises an error, and warn of the first one, so that the run continues.

        Args:
            what: Name for the warning.
            collective: Whether ranks exchange data in the block. Then an error on several ranks ends the run, in which
                the other ranks would wait forever.
        """
        try:
            yield
        except Exception as error:  # of any library that draws or writes
            if collective and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise
            if what not in self._left_out:
                warnings.warn(
                    f"{type(self).__name__}: {what} left out because of {type(error).__name__}: {first_line(error)}; "
                    "the run continues without.",
                    stacklevel=3,
                )
            self._left_out |= {what}

    def _hear(self, head: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names = dict(zip(("x", "target"), args, strict=False)) | kwargs
        plain = names.get("target") is None  # with a target the output carries the margin, or is a loss
        self._last = names["x"].detach(), output.detach() if plain else None

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._last = self._batch = self._handle = None

    def _take(self, batch: Any) -> tuple[Tensor, Tensor | None, Tensor] | None:
        last, self._last = self._last, None
        target = classes_of(batch)
        if last is None or target is None:
            return None
        features, logits = last
        return (features, logits, target.long()) if target.shape == features.shape[:1] else None


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers that write for TensorBoard."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def classes_of(batch: Any) -> Tensor | None:
    """The second part of a batch (images, classes, ...); nothing, of a batch of another kind."""
    if isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    return None
