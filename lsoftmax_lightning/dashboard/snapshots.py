"""Data of a validation or test that the dashboard draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import effective_margin
from . import plots


class ConfusedImages(NamedTuple):
    """The K images with the largest ``confidence_gap``, in descending order."""

    confidence_gap: Tensor
    """Probability of the predicted class minus that of the true class, ``(K,)``; 0 for correct predictions."""
    target: Tensor
    """True class, ``(K,)``."""
    prediction: Tensor
    """Predicted class, ``(K,)``."""
    angles: Tensor
    """Angle to the true class in degrees, ``(K,)``."""
    images: Tensor
    """Images, uint8, ``(K, channels, height, width)``."""
    image_index: Tensor
    """Index among the images of the evaluation, ``(K,)``."""


class Scatter(NamedTuple):
    """Arguments of :func:`~lsoftmax_lightning.dashboard.plots.feature_scatter`."""

    class_names: list[str]
    """Names of the C' classes shown."""
    points: Tensor
    """Position of each feature, ``(N', 2)``."""
    rays: Tensor
    """Direction of the weight of each class shown, ``(C', 2)``."""
    target: Tensor
    """Index of the class of each point among the classes shown, or -1, ``(N',)``."""


@dataclass(kw_only=True)
class Snapshot:
    """The head after a validation or test, and the angles of training.

    Args:
        stage: ``val`` or ``test``.
        step: Number of optimiser steps taken.
        margin: m.
        lambda_: Weight of the plain logit; None outside of training.
        nearest_angle: Mean angle of a class weight to the nearest other one, in degrees.
        paths: File of each image of the evaluation; empty if the images are not read from files.
        train_angles: Angles of training samples to their class since the last snapshot, in degrees.
        baseline: Angles of another run to compare with, by name.
    """

    stage: str
    step: int
    margin: int
    lambda_: float | None
    nearest_angle: float
    paths: Sequence[str | Path] = ()
    train_angles: Tensor = field(default_factory=lambda: torch.empty(0))
    baseline: Mapping[str, Tensor] = field(default_factory=dict)

    def angles_by_stage(self) -> dict[str, Tensor]:
        """Return the angles of samples to their class, in degrees."""
        return {"train": self.train_angles}

    def image_id(self, index: int) -> str:
        """Return the file of an image, or its index if the images are not from files."""
        return str(self.paths[index] if index < len(self.paths) else index)

    def title(self, subject: str) -> str:
        """Return the title of a plot: the subject; in a second line the margin, and in training lambda and step."""
        title = f"{subject}\nm = {self.margin}"
        if self.lambda_ is None:  # outside of fit, the step of the weights is unknown
            return title
        if self.margin > 1:
            title += f", lambda {self.lambda_:.3g} (effective {effective_margin(self.margin, self.lambda_):.2f})"
        return f"{title}, step {self.step}"


@dataclass(kw_only=True)
class ClassSnapshot(Snapshot):
    """Snapshot of an evaluation on the C classes of the head.

    Args:
        class_names: Name of each class.
        shown: Indices of the C' classes that plots show.
        weight: Weights of the classes shown, ``(C', D)``.
        target: Class of each sample, ``(N,)``.
        prediction: Predicted class of each sample, ``(N,)``.
        angles: Angle of each sample to its class, in degrees, ``(N,)``.
        features: x of some samples, ``(N', D)``.
        features_target: Their classes, ``(N',)``.
        thumbnails: Their images, uint8, ``(N', channels, height, width)``.
        confused: The most confused images.
    """

    class_names: Sequence[str]
    shown: Tensor
    weight: Tensor
    target: Tensor
    prediction: Tensor
    angles: Tensor
    features: Tensor
    features_target: Tensor
    thumbnails: Tensor
    confused: ConfusedImages

    def angles_by_stage(self) -> dict[str, Tensor]:
        """Return the angles of samples to their class, in degrees."""
        return super().angles_by_stage() | {self.stage: self.angles}

    def scatter(self) -> Scatter:
        """Return the features as points of a plane, see :func:`~lsoftmax_lightning.dashboard.plots.plane`."""
        names = [self.class_names[index] for index in self.shown]
        points, rays = plots.plane(self.features, self.weight)
        return Scatter(names, points, rays, self._shown_index()[self.features_target])

    def confusion_counts(self) -> tuple[Tensor, Tensor]:
        """Return images by true and predicted class, ``(C', C')``, and by true class, ``(C',)``, of classes shown."""
        shown_index = self._shown_index()
        target, prediction = shown_index[self.target], shown_index[self.prediction]
        cell = (target * len(self.shown) + prediction)[(target >= 0) & (prediction >= 0)]
        counts = torch.bincount(cell, minlength=len(self.shown) ** 2).view(len(self.shown), -1)
        return counts, torch.bincount(target[target >= 0], minlength=len(self.shown))

    def embedding(self) -> dict[str, Any]:
        """Return the arguments of ``SummaryWriter.add_embedding``."""
        return {
            "mat": self.features,
            "metadata": [[self.class_names[index], index] for index in self.features_target.tolist()],
            "metadata_header": ["class", "index"],
            "label_img": _pad_width(self.thumbnails.expand(-1, 3, -1, -1)).float() / 255,
        }

    def _shown_index(self) -> Tensor:
        """Return the index of each class among the classes shown, or -1, ``(C,)``."""
        shown_index = torch.full((len(self.class_names),), -1)
        shown_index[self.shown] = torch.arange(len(self.shown))
        return shown_index


@dataclass(kw_only=True)
class PairSnapshot(Snapshot):
    """Snapshot of an evaluation on P pairs of images.

    Args:
        cosines: Cosine of the embeddings of each pair, ``(P,)``.
        same: Whether a pair shows the same identity, bool, ``(P,)``.
        hardest: Indices of the K hardest pairs, ``(K,)``.
        hardest_pairs: Indices of their two images, ``(K, 2)``.
        images: Both images of each hardest pair side by side, uint8, ``(K, channels, height, width)``, or None.
    """

    cosines: Tensor
    same: Tensor
    hardest: Tensor
    hardest_pairs: Tensor
    images: Tensor | None


def _pad_width(images: Tensor) -> Tensor:
    """Pad tall images to squares with black, because TensorBoard's sprites cannot hold tall images."""
    missing = max(0, images.shape[2] - images.shape[3])
    return F.pad(images, (missing // 2, missing - missing // 2))
