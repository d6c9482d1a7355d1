"""Figures of what the features are worth, as torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_eer, binary_roc
from torchmetrics.utilities import dim_zero_cat

from .errors import InputError
from .geometry import segment_counts, separation, target_angles


class ClassAngles(Metric):
    """What the margin is for: how close samples are to their class, and how far classes are from each other.

    ``compute`` gives a dict of: ``angle``, the mean angle of a sample to the weight of its class, in degrees;
    ``centre_angle_mean``, ``_nearest`` and ``_min``, the :func:`~lsoftmax_lightning.geometry.separation` of the mean
    directions of the classes; ``feature_norm``, the mean length of a feature; and ``segment_0`` to
    ``segment_{m-1}``, the share of samples in each segment k of psi (section 3.2), the last of them furthest from their
    class. All are exact for batches and processes of any size; of no sample there are no figures.

    Args:
        num_classes: C.
        in_features: D, the width of a feature.
        margin: m, an integer >= 1.
        **kwargs: As :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    angle: Tensor
    norm: Tensor
    segments: Tensor
    directions: Tensor

    def __init__(self, num_classes: int, in_features: int, margin: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.margin = margin
        for name, shape in (
            ("angle", ()),
            ("norm", ()),
            ("segments", margin),
            ("directions", (num_classes, in_features)),
        ):
            self.add_state(name, torch.zeros(shape), dist_reduce_fx="sum")

    def update(self, features: Tensor, weight: Tensor, target: Tensor) -> None:
        """Takes a batch.

        Args:
            features: x, [N, D].
            weight: W, [C, D].
            target: Class of each sample, [N], int64.
        """
        angles = target_angles(features, weight[target])
        self.angle += angles.sum()
        self.norm += torch.linalg.vector_norm(features.float(), dim=1).sum()
        self.segments += segment_counts(angles, self.margin)
        self.directions.index_add_(0, target, normalize(features.float()))

    def compute(self) -> dict[str, Tensor]:
        """The figures, by name."""
        count = self.segments.sum()
        if not count:
            return {}
        centres = separation(self.directions[self.directions.any(dim=1)])  # of the classes that were seen
        return {
            "angle": self.angle / count,
            "feature_norm": self.norm / count,
            **{f"centre_angle_{name}": angle for name, angle in centres._asdict().items()},
            **{f"segment_{k}": share for k, share in enumerate(self.segments / count)},
        }


class MeanLoss(Metric):
    """The mean over samples of losses that are means over batches.

    It is exact for batches and processes of any size, and NaN if a loss is. Lightning's own mean is wrong where
    processes have different numbers of samples (its issue 21859), and torchmetrics' ``MeanMetric`` leaves out the sizes
    of batches where it is told to leave NaN alone.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, dtype in (("total", torch.float32), ("count", torch.int64)):
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, loss: Tensor, size: int) -> None:
        """Takes the mean loss, 0-d, of a batch of that many samples."""
        # not in place: a Trainer may validate within inference mode and then train without it, and in half precision
        # (bf16-true, say) it has made that of the state
        self.total = self.total + loss.detach().to(torch.promote_types(loss.dtype, torch.float32)) * size
        self.count = self.count + size

    def compute(self) -> Tensor:
        """The mean, 0-d."""
        return self.total / self.count


class PairVerification(Metric):
    """Whether two images show the same identity, told from the cosine of their embeddings: the protocol of LFW.

    Each fold in turn is scored with the threshold that is best for all other pairs, on embeddings that PCA, where it
    is asked for, projects on the main components of the images of those other pairs that are in none of the fold: PCA
    sees no image that it is scored on. The ROC figures are of the scored pairs of all folds together.

    Every image is given once, with its number, in batches of any size and on any number of processes.

    ``compute`` gives a dict of: ``acc``, the mean over folds; ``acc_stderr``, its standard error (over folds; for a
    single one, that of a share); ``auc``, the area under the ROC curve; ``eer``, the equal error rate; and
    ``tar_at_far_1e-2`` and ``tar_at_far_1e-3``, the share of same pairs accepted where at most that share of the
    different ones is. They are NaN, with a warning, where embeddings are missing (in a ``fast_dev_run``, say) or not
    finite; else ``cosines`` has the cosine of each scored pair, in their order.

    Args:
        pairs: int64 [P, 4]: number of the one image, number of the other, 1 for the same identity or 0, and the fold.
            Folds count from 1; pairs of fold 0 are fitted on and never scored.
        pca_components: Width to which PCA brings the embeddings, if any (the paper's choice, section 5).
        **kwargs: As :class:`torchmetrics.Metric`.

    Raises:
        InputError: If ``pairs`` is not of this form, lacks one of the two kinds, or has nothing, or for PCA too few
            images, to fit on.

    Example:
        >>> import torch
        >>> from lsoftmax_lightning.metrics import PairVerification
        >>> metric = PairVerification(torch.tensor([[0, 1, 1, 1], [0, 2, 0, 1], [3, 4, 1, 2], [3, 5, 0, 2]]))
        >>> metric.update(torch.eye(4)[[0, 0, 1, 2, 2, 3]], torch.arange(6))
        >>> metric.compute()["acc"]
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    embeddings: list[Tensor]
    numbers: list[Tensor]
    cosines: Tensor | None

    def __init__(self, pairs: Tensor, pca_components: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if pairs.ndim != 2 or pairs.shape[1] != 4 or pairs.dtype != torch.int64 or bool((pairs < 0).any()):
            raise InputError(f"pairs must be int64 [P, 4], none below 0, got {pairs.dtype} {tuple(pairs.shape)}.")
        same, fold = pairs[:, 2], pairs[:, 3]
        if set(same[fold > 0].tolist()) != {0, 1}:
            raise InputError("among the pairs of folds 1, 2, ... there must be same (1) and different ones (0) alone.")
        if len(set(fold.tolist())) < 2:
            raise InputError("pairs of one fold leave none to fit the threshold on; give some fold 0, or make more.")
        self.pairs = pairs.cpu()
        self.cosines = None
        self.pca_components = pca_components
        if pca_components is not None:
            least = min(len(self._seen(fold == number)) for number in set(fold[fold > 0].tolist()))
            if not 1 <= pca_components <= least:
                raise InputError(f"pca_components must be 1 to {least}, the images to fit on, got {pca_components}.")
        self.add_state("embeddings", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, numbers: Tensor) -> None:
        """Takes a batch.

        Args:
            embeddings: [N, D].
            numbers: The images' numbers in ``pairs``, [N].
        """
        self.embeddings.append(embeddings)
        self.numbers.append(numbers)

    def compute(self) -> dict[str, Tensor]:
        """The figures, by name, float64.

        Raises:
            InputError: If PCA is to give more components than the embeddings have.
        """
        self.cosines = None
        numbers = dim_zero_cat(self.numbers).cpu()
        given = dim_zero_cat(self.embeddings).cpu().double()
        if self.pca_components is not None and self.pca_components > given.shape[1]:
            raise InputError(f"embeddings of {given.shape[1]} features have no {self.pca_components} components.")
        first, second, same, fold = self.pairs.T
        counted = fold > 0
        wanted = torch.unique(self.pairs[:, :2])
        of_use = torch.isin(numbers, wanted) & given.isfinite().all(dim=1)
        numbers, given = numbers[of_use], given[of_use]
        missing = ~torch.isin(wanted, numbers)
        if missing.any():
            rank_zero_warn(
                f"{int(missing.sum())} of {len(wanted)} images were not embedded, or not to finite numbers: no figures "
                "of the pairs."
            )
            return dict.fromkeys(_FIGURES, torch.tensor(math.nan, dtype=torch.float64))
        table = given.new_zeros(int(wanted[-1]) + 1, given.shape[1])
        table[numbers] = given  # an image that came twice counts once

        scores, shares = torch.zeros(len(fold), dtype=torch.float64), []
        for number in sorted(set(fold[counted].tolist())):
            scored = fold == number
            projected = table
            if self.pca_components is not None:
                projected = _project(table, self._seen(scored), self.pca_components)
            cosine = cosine_similarity(projected[first], projected[second]).clamp(-1, 1)
            accepted = cosine > _best_threshold(cosine[~scored], same[~scored])
            shares.append((accepted == same.bool())[scored].double().mean())
            scores[scored] = cosine[scored]
        accuracies = torch.stack(shares)
        mean = accuracies.mean()
        if len(accuracies) > 1:
            error = accuracies.std() / math.sqrt(len(accuracies))
        else:
            error = (mean * (1 - mean) / counted.sum()).sqrt()
        shifted, labels = (scores[counted] + 1) / 2, same[counted]  # what is outside 0 .. 1 would be taken for logits
        fpr, tpr, _ = binary_roc(shifted, labels)
        self.cosines = scores[counted]
        figures = (
            *(mean, error, binary_auroc(shifted, labels), binary_eer(shifted, labels)),
            *(tpr[fpr <= rate].max() for rate in (1e-2, 1e-3)),
        )
        return {name: figure.double() for name, figure in zip(_FIGURES, figures, strict=True)}

    def _seen(self, scored: Tensor) -> Tensor:
        """Numbers of the images that PCA may see, where these pairs are scored."""
        seen: Tensor = torch.unique(self.pairs[~scored, :2])
        return seen[~torch.isin(seen, self.pairs[scored, :2])]


_FIGURES = ("acc", "acc_stderr", "auc", "eer", "tar_at_far_1e-2", "tar_at_far_1e-3")


def _best_threshold(cosine: Tensor, same: Tensor) -> Tensor:
    """Midway between the last pair accepted and the first refused where most pairs are told right."""
    fpr, tpr, thresholds = binary_roc((cosine + 1) / 2, same)
    positives = same.sum()
    right = (tpr * positives).round() - (fpr * (len(same) - positives)).round()
    best = int(right.argmax())
    refused = torch.cat([thresholds, thresholds.new_tensor([-1.0])])  # nothing, where all are accepted
    return refused[best : best + 2].mean() * 2 - 1


def _project(table: Tensor, seen: Tensor, components: int) -> Tensor:
    """All rows on the main components of the rows that PCA may see."""
    fitted = table[seen]
    _, axes = torch.linalg.eigh(torch.cov(fitted.T))
    projected: Tensor = (table - fitted.mean(0)) @ axes[:, -components:]
    return projected
