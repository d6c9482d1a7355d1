"""Collection of the batches of a validation or test into a snapshot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from ..class_names import names_by_index
from ..compat import current_datamodule
from ..geometry import evenly_spaced, target_angles
from ..heads import LSoftmaxLinear
from ..metrics import PairVerification
from .observer import HeadObserver
from .scalars import weight_separation
from .snapshots import ClassSnapshot, ConfusedImages, PairSnapshot, Snapshot

_MAX_CLASSES = 100  # in a plot, which has that many distinct markers and colours
_STRIP_IMAGES = 12
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
_THUMBNAIL_SIDE = 48  # pixels of an image in the projector, at most


class _Predictions(NamedTuple):
    """All samples of a batch."""

    target: Tensor
    prediction: Tensor
    angles: Tensor


class _Samples(NamedTuple):
    """Some samples of a batch."""

    features: Tensor
    target: Tensor
    thumbnails: Tensor


class EvalCollector:
    """Collect all predictions, some features and the most confused images of batches, on their device.

    Args:
        max_samples: Maximum number of features and thumbnails.
        datamodule: Datamodule whose ``mean`` and ``std`` undo the normalisation. Without them, each image is min-max
            scaled.
        num_batches: Number of batches. An equal share of ``max_samples`` is kept of each, spread evenly over its
            samples. If it is infinite, at least half of ``max_samples`` are kept, spread evenly over all samples.
        rank: Rank of this process. Each rank has every ``world_size``-th sample.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        max_samples: int,
        datamodule: object,
        num_batches: float = math.inf,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._max_samples, self._num_batches = max_samples, num_batches
        self._rank, self._world_size = rank, world_size
        self._mean, self._std = getattr(datamodule, "mean", None), getattr(datamodule, "std", None)
        self._num_seen = 0
        self._fraction = 1.0  # of the samples to keep, if the number of batches is unknown
        self._keys = torch.empty(0, dtype=torch.float64)  # of the kept samples
        self._failed = False
        self._predictions: list[_Predictions] = []
        self._samples: list[_Samples] = []
        self._confused: ConfusedImages | None = None

    @property
    def is_complete(self) -> bool:
        """Whether there were batches, and all were added without an error."""
        return bool(self._predictions) and not self._failed

    def update(self, images: Any, features: Tensor, logits: Tensor, target: Tensor, weight: Tensor) -> None:
        """Add a batch.

        Args:
            images: ``(N, channels, height, width)``; anything else is shown in black. uint8 images are not rescaled.
                Of three or more channels the first three are shown in colour, of fewer the first in grey.
            features: x, ``(N, D)``.
            logits: Plain logits, ``(N, C)``.
            target: Class of each sample, int64, ``(N,)``.
            weight: W, ``(C, D)``.
        """
        try:
            if not isinstance(images, Tensor) or images.ndim != 4:
                images = features.new_zeros(len(target), 1, 1, 1, dtype=torch.uint8)
            kept = self._select(target)
            thumbnails = _thumbnails(self._to_bytes(images[kept]))
            self._samples.append(_Samples(features[kept].float().clone(), target[kept], thumbnails))
            probabilities = logits.float().softmax(dim=1)
            probability, prediction = probabilities.max(dim=1)
            angles = target_angles(features, weight[target])
            self._predictions.append(_Predictions(target, prediction, angles))
            gap = probability - probabilities.gather(1, target.unsqueeze(1)).squeeze(1)
            rows = _top_rows(gap)
            images = self._to_bytes(images[rows])
            index = self._rank + self._world_size * (self._num_seen + rows)
            confused = ConfusedImages(gap[rows], target[rows], prediction[rows], angles[rows], images, index)
            self._confused = confused if self._confused is None else _most_confused([self._confused, confused])
            self._num_seen += len(target)
        except Exception:
            self._failed = True
            raise

    def snapshot(self, **fields: Any) -> ClassSnapshot:
        """Return the snapshot of all ranks, on the CPU. Call it on all ranks.

        Args:
            **fields: The fields of :class:`ClassSnapshot` that are not collected from batches.
        """
        assert self._confused is not None
        predictions = _Predictions(*_gather_rows(_concatenate(self._predictions)))
        samples = _Samples(*_gather_rows(_concatenate(self._samples)))
        return ClassSnapshot(
            target=predictions.target,
            prediction=predictions.prediction,
            angles=predictions.angles,
            features=samples.features,
            features_target=samples.target,
            thumbnails=samples.thumbnails,
            confused=_most_confused([ConfusedImages(*_gather_rows(self._confused))]),
            **fields,
        )

    def _select(self, target: Tensor) -> Tensor:
        """Return the rows of a batch to keep, and drop earlier samples if there are too many."""
        # Multiples of the golden ratio modulo 1 are spread evenly over [0, 1), whatever the order of the classes.
        keys = (torch.arange(len(target), dtype=torch.float64) + self._num_seen) * _GOLDEN_RATIO % 1
        if self._num_batches != math.inf:
            index = len(self._predictions)
            start, end = (i * self._max_samples // self._num_batches for i in (index, index + 1))
            return keys.argsort()[: int(end - start)].sort().values.to(target.device)
        found = torch.cat([self._keys, keys[keys < self._fraction]])
        if len(found) > self._max_samples:
            self._fraction = float(found.sort().values[max(1, self._max_samples // 2)])
            if self._samples:
                earlier = (self._keys < self._fraction).nonzero().squeeze(1).to(target.device)
                self._samples = [_Samples(*(column[earlier] for column in _concatenate(self._samples)))]
        self._keys = found[found < self._fraction]
        return (keys < self._fraction).nonzero().squeeze(1).to(target.device)

    def _to_bytes(self, images: Tensor) -> Tensor:
        """Convert images to uint8 with one or three channels."""
        channels = slice(3 if images.shape[1] > 2 else 1)
        if images.dtype == torch.uint8:
            return images[:, channels].clone()  # a view would keep the batch in memory
        images = images.float()
        if self._mean is not None and self._std is not None:
            std, mean = (images.new_tensor(values).view(-1, 1, 1) for values in (self._std, self._mean))
            images = (images * std + mean)[:, channels]
        else:
            images = images[:, channels]
            low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
            images = (images - low) / (high - low).clamp_min(1e-12)
        return (images * 255).round().clamp(0, 255).to(torch.uint8)


class SnapshotObserver(HeadObserver):
    """Base class that collects each validation and test into a snapshot.

    Observers of a Trainer with equal ``max_samples`` share a collection: the first of them collects for all.

    Attributes:
        max_samples: Maximum number of features and thumbnails, on all ranks together.
    """

    max_samples = 2000
    _collector: EvalCollector | None = None

    def observe_snapshot(self, trainer: Trainer, snapshot: Snapshot | None) -> None:
        """Receive the snapshot of a validation or test, on all ranks; None after an error."""

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_collection(trainer, trainer.num_val_batches)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_collection(trainer, trainer.num_test_batches)

    @override
    def observe_evaluation(
        self, head: LSoftmaxLinear, images: Any, features: Tensor, logits: Tensor, target: Tensor
    ) -> None:
        if self._collector is not None:
            with self.optional("images, features and predictions", collective=True):
                self._collector.update(images, features, logits, target, head.full_weight)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._end_collection(trainer, pl_module, "val")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_collection(trainer, pl_module, "test")

    def _sharing_observers(self, trainer: Trainer) -> list[SnapshotObserver]:
        return [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, SnapshotObserver)
            and callback.is_observing
            and callback.max_samples == self.max_samples
        ]

    def _start_collection(self, trainer: Trainer, num_batches: Sequence[float]) -> None:
        if not trainer.sanity_checking and next(iter(self._sharing_observers(trainer)), None) is self:
            max_samples = math.ceil(self.max_samples / trainer.world_size)
            datamodule = current_datamodule(trainer)
            self._collector = EvalCollector(
                max_samples, datamodule, sum(num_batches), trainer.global_rank, trainer.world_size
            )

    def _end_collection(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        head = self.observed_head(pl_module)
        collector, self._collector = self._collector, None  # releases device memory
        if head is None or collector is None:
            return
        snapshot = None
        with self.optional(f"the {stage} snapshot", collective=True):
            snapshot = collect_snapshot(trainer, pl_module, head, stage, collector)
        for observer in self._sharing_observers(trainer):
            observer.observe_snapshot(trainer, snapshot)

    @override
    def detach(self) -> None:
        super().detach()
        self._collector = None


def collect_snapshot(
    trainer: Trainer, pl_module: LightningModule, head: LSoftmaxLinear, stage: str, collector: EvalCollector
) -> Snapshot:
    """Return the snapshot of a validation or test. Call it on all ranks.

    Args:
        trainer: The Trainer, at the end of the stage.
        pl_module: Its module.
        head: The head of the module.
        stage: ``val`` or ``test``.
        collector: Collector of its batches.
    """
    datamodule = current_datamodule(trainer)
    images = getattr(getattr(datamodule, f"{stage}_data", None), "images", None)
    fields: dict[str, Any] = {
        "paths": getattr(images, "paths", ()),
        "stage": stage,
        "step": trainer.global_step,
        "margin": head.margin,
        "lambda_": head.lambda_ if trainer.state.fn == TrainerFn.FITTING else None,
        "nearest_angle": float(weight_separation(head).nearest),
    }
    if trainer.strategy.reduce_boolean_decision(collector.is_complete):  # on all ranks
        names = names_by_index(datamodule)
        shown = evenly_spaced(head.num_classes, _MAX_CLASSES)
        return collector.snapshot(
            weight=head.class_weights(shown.to(head.weight.device)).float().cpu(),
            shown=shown,
            class_names=tuple(names.get(index, str(index)) for index in range(head.num_classes)),
            **fields,
        )
    verification = getattr(pl_module, "verification", None)
    if isinstance(verification, PairVerification) and verification.cosines is not None:
        return _pair_snapshot(verification, verification.cosines, images, **fields)
    return Snapshot(**fields)


def _pair_snapshot(verification: PairVerification, cosines: Tensor, images: Any, **fields: Any) -> PairSnapshot:
    """Return a snapshot with the hardest pairs, and with their images unless ``images`` is None."""
    scored = verification.pairs[verification.pairs.is_scored]
    hardness = torch.where(scored.same, -cosines, cosines)  # far apart for the same identity, close for different ones
    hardest = torch.cat([_hardest(hardness, scored.same), _hardest(hardness, ~scored.same)])
    if images is not None:
        images = torch.cat([images[scored.first[hardest]], images[scored.second[hardest]]], dim=3)
    pairs = torch.stack([scored.first[hardest], scored.second[hardest]], dim=1)
    return PairSnapshot(
        cosines=cosines, same=scored.same, hardest=hardest, hardest_pairs=pairs, images=images, **fields
    )


def _hardest(hardness: Tensor, mask: Tensor) -> Tensor:
    indices = mask.nonzero().squeeze(1)
    return indices[_top_rows(hardness[indices], _STRIP_IMAGES // 2)]


def _top_rows(values: Tensor, count: int = _STRIP_IMAGES) -> Tensor:
    """Return the indices of the largest values in descending order."""
    return values.topk(min(count, len(values))).indices


def _most_confused(batches: Sequence[ConfusedImages]) -> ConfusedImages:
    confused = ConfusedImages(*_concatenate(batches))
    rows = _top_rows(confused.confidence_gap)
    return ConfusedImages(*(column[rows] for column in confused))


def _thumbnails(images: Tensor) -> Tensor:
    scale = _THUMBNAIL_SIDE / max(images.shape[2:])
    if scale >= 1:
        return images
    size = [max(1, int(side * scale)) for side in images.shape[2:]]
    return F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)


def _concatenate(batches: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*batches, strict=True)]


def _gather_rows(columns: Sequence[Tensor]) -> list[Tensor]:
    """Return the rows of all ranks, on the CPU."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return [torch.cat(gather_all_tensors(column)).cpu() for column in columns]
    return [column.cpu() for column in columns]
