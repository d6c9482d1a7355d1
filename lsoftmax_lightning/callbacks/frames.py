"""What the dashboard keeps of one validation or test, and the pictures it is drawn as, perhaps much later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.utilities.distributed import gather_all_tensors

from .. import pictures
from ..class_names import names_by_index
from ..geometry import degrees, effective_margin, evenly_spaced, separation, target_angles

_SHOWN = 100  # classes that can be told apart in a picture
_HARD = 12  # images in a strip
_THUMBNAIL = 48  # pixels of the side of an image in the projector, at most


class Picture(NamedTuple):
    """A figure and the numbers in it."""

    name: str
    figure: Figure
    header: Sequence[str]
    rows: Iterable[Sequence[Any]]


@dataclass(kw_only=True)
class Frame:
    """A moment of training, to be drawn: the head as it was and what a validation or test (``stage``) has seen.

    ``lambda_`` is known in training alone; ``nearest`` is the mean angle from a class weight to the nearest one;
    ``baseline`` has angles of another run, to compare with. Of a stage that has seen nothing there are the angles of
    training alone.
    """

    stage: str
    step: int
    margin: int
    lambda_: float | None
    nearest: float
    train_angles: Tensor
    baseline: Mapping[str, Tensor] = field(default_factory=dict)

    def angle_samples(self) -> dict[str, Tensor]:
        """Angles of samples to their class, in degrees, by stage."""
        return {"train": self.train_angles}

    def draw(self) -> Iterator[Picture]:
        """All pictures, one by one."""
        angles = self.angle_samples() | dict(self.baseline)
        boundaries = {"boundary of softmax": self.nearest / 2}
        if self.margin > 1:
            boundaries[f"what m = {self.margin} asks for"] = self.nearest / (self.margin + 1)
        figure = pictures.angle_histogram(angles, boundaries, self._title("angle to the own class"))
        rows = ((name, angle) for name, values in angles.items() for angle in values.tolist())
        yield Picture("angles", figure, ("stage", "degrees"), rows)

    def _title(self, what: str) -> str:
        title = f"{what}, m = {self.margin}"
        if self.lambda_ is None:  # not in training: of weights from who knows which step
            return title
        if self.margin > 1:
            title += f" at lambda {self.lambda_:.3g} (effective {effective_margin(self.margin, self.lambda_):.2f})"
        return f"{title}, step {self.step}"


@dataclass(kw_only=True)
class ClassFrame(Frame):
    """Of a validation or test on the classes of the head."""

    class_names: Sequence[str]
    shown: Tensor
    weight: Tensor
    target: Tensor
    prediction: Tensor
    angles: Tensor
    features: Tensor
    features_target: Tensor
    thumbnails: Tensor
    worst: Sequence[Tensor]

    def angle_samples(self) -> dict[str, Tensor]:
        """Angles of samples to their class, in degrees, by stage."""
        return super().angle_samples() | {self.stage: self.angles}

    def draw(self) -> Iterator[Picture]:
        """All pictures, one by one."""
        yield from super().draw()
        names, points, rays, target = self.scatter()
        of = f" of {len(names)} of {len(self.class_names)} classes" * (len(names) < len(self.class_names))

        figure = pictures.feature_scatter(points, rays, target, names, self._title(f"features{of}"))
        rows = [(*point, names[c]) for point, c in zip(points.tolist(), target.tolist(), strict=True) if c >= 0]
        yield Picture("features", figure, ("x", "y", "class"), rows)

        unit = normalize(self.weight)
        between = degrees(unit @ unit.T).fill_diagonal_(0)
        figure = pictures.angle_map(between, names, self._title(f"angles between the weights{of}"))
        yield Picture("class_angles", figure, ("class", *names), _rows(names, between))

        counts, totals = self.counts()
        for picture, values, kind in (
            ("confusion", counts, "images"),
            ("confusion_percent", pictures.percent_of_rows(counts, totals), "% of the true class"),
        ):
            figure = pictures.confusion(values, names, kind, self._title(f"confusion{of}"))
            yield Picture(picture, figure, ("true class", *names), _rows(names, values))

        mistakes = self.worst[0] > 0
        if mistakes.any():
            *numbers, images = (part[mistakes] for part in self.worst[1:])
            rows = [
                (self.class_names[target], self.class_names[prediction], angle)
                for target, prediction, angle in zip(*(part.tolist() for part in numbers), strict=True)
            ]
            captions = ["{}\ntaken for {}\n{:.0f}°".format(*row) for row in rows]
            figure = pictures.image_strip(images, captions, self._title("most confused"))
            yield Picture("most_confused", figure, ("true class", "predicted class", "degrees"), rows)

    def scatter(self) -> tuple[list[str], Tensor, Tensor, Tensor]:
        """Names of the classes shown, points and rays of :func:`~lsoftmax_lightning.pictures.plane`, classes of points.

        Classes are numbered among those shown, -1 for others.
        """
        names = [self.class_names[number] for number in self.shown]
        return names, *pictures.plane(self.features, self.weight), self._place()[self.features_target]

    def counts(self) -> tuple[Tensor, Tensor]:
        """Images by true and predicted class, of the classes shown, and all of each true class."""
        target, prediction = self._place()[self.target], self._place()[self.prediction]
        cell = (target * len(self.shown) + prediction)[(target >= 0) & (prediction >= 0)]
        counts = torch.bincount(cell, minlength=len(self.shown) ** 2).view(len(self.shown), -1)
        return counts, torch.bincount(target[target >= 0], minlength=len(self.shown))

    def _place(self) -> Tensor:
        """Of each class, its place among those shown, or -1."""
        place = torch.full((len(self.class_names),), -1)
        place[self.shown] = torch.arange(len(self.shown))
        return place

    def embedding(self) -> dict[str, Any]:
        """For the projector."""
        return {
            "mat": self.features,
            "metadata": [[self.class_names[number], number] for number in self.features_target.tolist()],
            "metadata_header": ["class", "number"],
            "label_img": _not_tall(self.thumbnails.expand(-1, 3, -1, -1)).float() / 255,
        }


@dataclass(kw_only=True)
class PairFrame(Frame):
    """Of a validation or test on pairs of images."""

    cosines: Tensor
    same: Tensor
    hardest: Tensor
    images: Tensor | None

    def draw(self) -> Iterator[Picture]:
        """All pictures, one by one."""
        yield from super().draw()
        angles = degrees(self.cosines)
        rows = list(zip(self.cosines.tolist(), angles.tolist(), self.same.tolist(), strict=True))
        header = ("cosine", "degrees", "same")
        curve = {"pairs": (self.cosines, self.same)}
        figure = pictures.roc(curve, self._title(f"ROC curve of {len(rows)} pairs"))
        yield Picture("roc", figure, header, rows)
        both = {"same": angles[self.same], "different": angles[~self.same]}
        figure = pictures.angle_histogram(both, {}, self._title("angle between two images"))
        yield Picture("pair_angles", figure, header, rows)
        if self.images is not None:
            rows = [rows[pair] for pair in self.hardest.tolist()]
            captions = [f"{'same' if same else 'different'}: {angle:.0f}°" for _, angle, same in rows]
            figure = pictures.image_strip(self.images, captions, self._title("hardest pairs"))
            yield Picture("hardest_pairs", figure, header, rows)


def _rows(names: Sequence[str], matrix: Tensor) -> Iterable[Sequence[Any]]:
    return ((name, *values) for name, values in zip(names, matrix.tolist(), strict=True))


def _shown_classes(num_classes: int) -> Tensor:
    """All classes or, where they are more than a picture can show, a hundred of them."""
    return torch.linspace(0, num_classes - 1, min(num_classes, _SHOWN)).round().long()


def _pair_frame(pairs: Tensor, cosines: Tensor, store: Any, **settings: Any) -> PairFrame:
    """Finds the pairs that are hardest to tell and their images, if ``store`` gives images by number."""
    scored = pairs[pairs[:, 3] > 0]
    same = scored[:, 2].bool()
    hardness = torch.where(same, -cosines, cosines)  # hard are same ones far apart and different ones near
    kinds = (same.nonzero().squeeze(1), (~same).nonzero().squeeze(1))
    hardest = torch.cat([kind[hardness[kind].topk(min(_HARD // 2, len(kind))).indices] for kind in kinds])
    images = None if store is None else torch.cat([store[scored[hardest, side]] for side in (0, 1)], dim=3)
    return PairFrame(cosines=cosines, same=same, hardest=hardest, images=images, **settings)


class ClassSample:
    """Collects from batches, on their device: all classes and predictions, some features, the worst mistakes.

    Args:
        per_batch: How many features and images of a batch to keep.
        datamodule: Tells by ``mean`` and ``std`` how images were normalised; without, each image's own range is used.
        limit: The most features and images to keep. Beyond it, every other one is dropped, and ``per_batch`` is halved.
    """

    def __init__(self, per_batch: int, datamodule: Any, limit: float = math.inf) -> None:
        self._per_batch, self._limit = per_batch, limit
        self._norm = getattr(datamodule, "mean", None), getattr(datamodule, "std", None)
        self._all: list[tuple[Tensor, ...]] = []
        self._some: list[tuple[Tensor, ...]] = []
        self._worst: tuple[Tensor, ...] = ()
        self._complete = True

    def update(self, images: Any, features: Tensor, logits: Tensor, target: Tensor, weight: Tensor) -> None:
        """Takes a batch."""
        complete, self._complete = self._complete, False  # after an error it stays so
        if not isinstance(images, Tensor) or images.ndim != 4:
            images = features.new_zeros(len(target), 1, 1, 1)  # nothing that could be shown
        shares = logits.float().softmax(dim=1)
        share, prediction = shares.max(dim=1)
        angles = target_angles(features, weight[target])
        self._all.append((target, prediction, angles))
        some = slice(self._per_batch)
        self._some.append((features[some].float().clone(), target[some], _thumbnails(self._bytes(images[some]))))
        if sum(len(batch) for batch, *_ in self._some) > self._limit:
            self._some = [tuple(part[::2].clone() for part in _joined(self._some))]
            self._per_batch = max(1, self._per_batch // 2)
        gap = share - shares.gather(1, target.unsqueeze(1)).squeeze(1)  # above 0 for a mistake
        gap, rows = gap.topk(min(_HARD, len(gap)))
        worst = gap, target[rows], prediction[rows], angles[rows], self._bytes(images[rows])
        self._worst = _top(*_joined([self._worst, worst])) if self._worst else worst
        self._complete = complete

    def __bool__(self) -> bool:
        return self._complete and bool(self._all)

    def frame(self, **settings: Any) -> ClassFrame:
        """What all processes have collected, on the CPU; ``settings`` are the rest of the frame."""
        names = ("target", "prediction", "angles", "features", "features_target", "thumbnails")
        collected = _gathered([*_joined(self._all), *_joined(self._some)])
        settings |= zip(names, collected, strict=True)
        return ClassFrame(worst=_top(*_gathered(self._worst)), **settings)

    def _bytes(self, images: Tensor) -> Tensor:
        images = images.float()
        mean, std = self._norm
        if mean is not None and std is not None:
            images = images * images.new_tensor(std).view(-1, 1, 1) + images.new_tensor(mean).view(-1, 1, 1)
        else:
            low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
            images = (images - low) / (high - low).clamp_min(1e-12)
        if images.shape[1] not in (1, 3):
            images = images[:, :1]
        return (images * 255).round().clamp(0, 255).to(torch.uint8)


def latest_angles(batches: Sequence[Tensor], count: int) -> Tensor:
    """The angles of the last ``count`` samples, in memory of their own."""
    return torch.cat(list(batches))[-count:].clone()


def class_sample(count: int, trainer: Trainer, num_batches: Sequence[float]) -> ClassSample:
    """Return a sample of the batches of an evaluation, of about ``count`` images in all processes together."""
    own, batches = math.ceil(count / trainer.world_size), sum(num_batches)
    data = trainer.datamodule  # type: ignore[attr-defined]
    if batches == math.inf:  # data without a length
        return ClassSample(own, data, limit=own)
    return ClassSample(max(1, math.ceil(count / (batches * trainer.world_size))), data)


def take_frame(
    trainer: Trainer, pl_module: Any, stage: str, sample: ClassSample | None, train_angles: Sequence[Tensor] = ()
) -> Frame:
    """What was seen of a validation or test; to be asked on every process.

    Args:
        trainer: The Trainer, when the stage is over.
        pl_module: Its module.
        stage: ``val`` or ``test``.
        sample: What was collected of its batches.
        train_angles: Angles of training since the frame before.
    """
    head, device, data = pl_module.head, pl_module.device, trainer.datamodule  # type: ignore[attr-defined]
    lambda_ = head.lambda_ if trainer.state.fn == TrainerFn.FITTING else None
    known = names_by_index(data)
    names = tuple(known.get(index, str(index)) for index in range(head.num_classes))
    settings = {
        **{"stage": stage, "step": trainer.global_step, "margin": head.margin, "lambda_": lambda_},
        "nearest": float(separation(head.class_weights(evenly_spaced(head.num_classes).to(device))).nearest),
        "train_angles": torch.cat(list(train_angles)).cpu() if train_angles else torch.empty(0),
    }
    if sample is not None and trainer.strategy.reduce_boolean_decision(bool(sample)):  # if all ranks have one
        shown = _shown_classes(head.num_classes)
        weight = head.class_weights(shown.to(device)).float().cpu()
        return sample.frame(weight=weight, shown=shown, class_names=names, **settings)
    verification = getattr(pl_module, "verification", None)
    if verification is not None and verification.cosines is not None:
        images = getattr(getattr(data, f"{stage}_data", None), "images", None)
        return _pair_frame(verification.pairs, verification.cosines, images, **settings)
    return Frame(**settings)


def _top(gap: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    rows = gap.topk(min(_HARD, len(gap))).indices
    return gap[rows], *(other[rows] for other in others)


def _thumbnails(images: Tensor) -> Tensor:
    scale = _THUMBNAIL / max(images.shape[2:])
    if scale >= 1:
        return images
    size = [max(1, int(side * scale)) for side in images.shape[2:]]
    return F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)


def _not_tall(images: Tensor) -> Tensor:
    """Images with black at both sides if they are taller than wide, for which TensorBoard has no room in its sprite."""
    missing = max(0, images.shape[2] - images.shape[3])
    return F.pad(images, (missing // 2, missing - missing // 2))


def _joined(batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _gathered(own: Sequence[Tensor]) -> list[Tensor]:
    """Rows of all processes, on the CPU."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return [torch.cat(gather_all_tensors(rows)).cpu() for rows in own]
    return [rows.cpu() for rows in own]
