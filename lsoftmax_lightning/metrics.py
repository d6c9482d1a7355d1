"""torchmetrics of features, losses and pairs."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_eer, binary_roc
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from .errors import InputError
from .geometry import segment_counts, separation, target_angles
from .pairs import Pairs


class ClassAngles(Metric):
    """Compactness and separation of classes: angles of samples to their class, and angles between classes.

    ``compute`` returns a dict, which is empty without samples:

    - ``angle``: mean angle of a sample to the weight of its class, in degrees.
    - ``centre_angle_mean``, ``centre_angle_nearest`` and ``centre_angle_min``: the
      :func:`~lsoftmax_lightning.geometry.separation` of the mean directions of the classes, in degrees.
    - ``feature_norm``: mean norm of the features.
    - ``segment_0`` to ``segment_{m-1}``: fraction of samples in each segment k of psi (section 3.2).

    The values do not depend on the sizes of batches and ranks. The states stay float32 or integers in a half-precision
    module.

    Args:
        num_classes: C.
        in_features: D, the width of a feature.
        margin: m, an integer >= 1.
        **kwargs: As :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    count: Tensor
    angle_sum: Tensor
    norm_sum: Tensor
    segments: Tensor
    direction_sums: Tensor

    def __init__(self, num_classes: int, in_features: int, margin: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.margin = margin
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("angle_sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("norm_sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("segments", torch.zeros(margin, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("direction_sums", torch.zeros(num_classes, in_features), dist_reduce_fx="sum")

    @override
    def update(self, features: Tensor, weight: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            features: x, ``(N, D)``.
            weight: W, ``(C, D)``.
            target: Class of each sample, int64, ``(N,)``.
        """
        angles = target_angles(features, weight[target])
        # Not in place, for the reasons in MeanLoss, except for the table of all classes, which is slow to copy.
        self.count = self.count + len(target)
        self.angle_sum = self.angle_sum + angles.sum()
        self.norm_sum = self.norm_sum + torch.linalg.vector_norm(features.float(), dim=1).sum()
        self.segments = self.segments + segment_counts(angles, self.margin).long()
        direction_sums = self.direction_sums.float()
        if direction_sums.is_inference() and not torch.is_inference_mode_enabled():
            direction_sums = direction_sums.clone()
        self.direction_sums = direction_sums.index_add_(0, target, normalize(features.float()))

    @override
    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics by name."""
        if not self.count:
            return {}
        centres = separation(self.direction_sums[self.direction_sums.any(dim=1)])  # of classes with samples
        return {
            "angle": self.angle_sum / self.count,
            "feature_norm": self.norm_sum / self.count,
            **{f"centre_angle_{name}": angle for name, angle in centres._asdict().items()},
            **{f"segment_{k}": fraction for k, fraction in enumerate(self.segments / self.count)},
        }


ANGLE_COUNTS = "lsoftmax_lightning_val_angle_counts"
"""Key of the angles of validation images to their predicted class in a checkpoint."""


class AngleHistogram(Metric):
    """Histogram of angles in bins of a tenth of a degree.

    ``compute`` returns the number of angles in each bin, int64, ``(1800,)``. Angles that are not finite are left out.
    """

    is_differentiable = False
    full_state_update = False

    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(1800, dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, angles: Tensor) -> None:
        """Add angles in degrees, from 0 to 180, ``(N,)``."""
        bins = (10 * angles[angles.isfinite()]).long().clamp(max=1799)
        self.counts = self.counts + torch.bincount(bins, minlength=1800)

    @override
    def compute(self) -> Tensor:
        """Return the counts."""
        return self.counts


def angle_quantile(counts: Tensor, q: float) -> float:
    """Return the smallest edge of a bin, in degrees, that at least a fraction of the angles do not exceed.

    Args:
        counts: Counts of an :class:`AngleHistogram`, not all 0.
        q: The fraction, above 0 and at most 1.
    """
    cumulative = counts.cumsum(0).double() / counts.sum()
    return (int((cumulative < q).sum()) + 1) / 10


def loss_weight(criterion: object, target: Tensor) -> Tensor | int:
    """Return the weight of the mean loss of a batch: the number of samples, or the sum of their class weights, 0-d.

    Args:
        criterion: A loss. :class:`torch.nn.CrossEntropyLoss` divides by this sum, without ignored classes.
        target: Class of each sample, ``(N,)``, int64.
    """
    if not isinstance(criterion, nn.CrossEntropyLoss) or criterion.reduction != "mean":
        return len(target)
    if criterion.weight is None and criterion.ignore_index < 0:  # no class is ignored
        return len(target)
    weights = torch.ones_like(target) if criterion.weight is None else criterion.weight[target]
    return (weights * (target != criterion.ignore_index)).sum()


class MeanLoss(Metric):
    """Mean over samples of losses that are means over batches.

    It is exact for batches and ranks of any size, and NaN if a loss is NaN. Lightning's own mean is wrong if ranks have
    different numbers of samples (https://github.com/Lightning-AI/pytorch-lightning/issues/21859). torchmetrics'
    ``MeanMetric`` ignores the batch sizes when it keeps NaN.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    @override
    def update(self, loss: Tensor, weight: Tensor | int) -> None:
        """Add the mean loss of a batch.

        Args:
            loss: Mean loss, 0-d.
            weight: Number of samples in the batch, or the sum of their weights, 0-d, on the device of the loss.
        """
        # Not in place: a Trainer may validate in inference mode and then train outside it. At least float32, because
        # the state may have half precision (with bf16-true, for example).
        total = loss.detach().to(torch.promote_types(loss.dtype, torch.float32)) * weight
        if isinstance(weight, Tensor):
            total = total.where(weight != 0, 0)  # the mean of an empty batch is NaN; `if` would wait for the device
        elif not weight:
            return
        self.total = self.total + total
        self.weight = self.weight.to(torch.float32) + weight

    @override
    def compute(self) -> Tensor:
        """Compute the mean, 0-d."""
        return self.total / self.weight


class PairVerification(Metric):
    """Face verification by the LFW protocol: two images show the same identity if the cosine exceeds a threshold.

    Each fold in turn is scored with the threshold that is best on all other pairs. With ``pca_components``, the
    embeddings are first projected by a PCA. It is fitted on the images of the other pairs, without images that are also
    in a pair of the scored fold. The ROC metrics are computed from the scored pairs of all folds together.

    Update it once with each image, in batches of any size and on any number of ranks. Every rank must update it at
    least once. ``compute`` returns a dict:

    - ``acc``: mean accuracy of the folds.
    - ``acc_stderr``: its standard error over the folds; with a single fold, that of a proportion.
    - ``auc``: area under the ROC curve.
    - ``eer``: equal error rate.
    - ``tar_at_far_1e-2``, ``tar_at_far_1e-3``: true accept rate at a false accept rate of at most 1e-2 and 1e-3.

    All are NaN, with a warning, if embeddings are missing (in a ``fast_dev_run``, for example) or not finite.

    Args:
        pairs: The pairs. Pairs of fold 0 are only used to fit the threshold and the PCA.
        pca_components: Number of principal components, as in the paper (section 5). None disables the PCA.
        **kwargs: As :class:`torchmetrics.Metric`.

    Attributes:
        pairs: The pairs, on the CPU.
        cosines: Cosine of each scored pair, float64, in their order; None before ``compute``, or if it returned NaN.

    Raises:
        InputError: If the scored pairs, or the pairs to fit a threshold on, are all same or all different, or there are
            too few images for the PCA.

    Example:
        >>> import torch
        >>> from lsoftmax_lightning.metrics import PairVerification
        >>> from lsoftmax_lightning.pairs import Pairs
        >>> table = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 1], [3, 4, 1, 2], [3, 5, 0, 2]])
        >>> metric = PairVerification(Pairs.from_table(table))
        >>> metric.update(torch.eye(4)[[0, 0, 1, 2, 2, 3]], torch.arange(6))
        >>> metric.compute()["acc"]
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False

    embeddings: list[Tensor]
    image_ids: list[Tensor]
    cosines: Tensor | None

    def __init__(self, pairs: Pairs, pca_components: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        scored_same = pairs.same[pairs.is_scored]
        if not 0 < scored_same.sum() < len(scored_same):
            raise InputError(
                "pairs: scored folds must contain both same and different pairs, got "
                f"{int(scored_same.sum())} same pairs of {len(scored_same)}; choose other pairs."
            )
        self.pairs = pairs.cpu()
        for fold in self._scored_folds():
            fitted_same = self.pairs.same[self.pairs.fold != fold]
            if not 0 < fitted_same.sum() < len(fitted_same):
                raise InputError(
                    f"pairs: the threshold of fold {fold} must be fitted on both same and different pairs of other "
                    f"folds, got {int(fitted_same.sum())} same pairs of {len(fitted_same)}; set the fold of some pairs "
                    "to 0, or use more folds."
                )
        self.cosines = None
        self.pca_components = pca_components
        if pca_components is not None:
            min_fit_images = min(len(self._pca_image_ids(self.pairs.fold == fold)) for fold in self._scored_folds())
            if not 1 <= pca_components < min_fit_images:
                raise InputError(
                    f"pca_components: must be at least 1 and below {min_fit_images}, the number of images to fit on, "
                    f"got {pca_components}; choose another number, or make more folds."
                )
        self.add_state("embeddings", [], dist_reduce_fx="cat")
        self.add_state("image_ids", [], dist_reduce_fx="cat")

    @override
    def update(self, embeddings: Tensor, image_ids: Tensor) -> None:
        """Add a batch.

        Args:
            embeddings: Embeddings, ``(N, D)``.
            image_ids: Index of each image in ``pairs``, ``(N,)``.
        """
        self.embeddings.append(embeddings)
        self.image_ids.append(image_ids)

    @override
    def reset(self) -> None:
        super().reset()
        self.cosines = None

    @override
    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics by name, float64.

        Raises:
            InputError: If embeddings have fewer features than ``pca_components``.
        """
        from sklearn.decomposition import PCA  # a slow import

        self.cosines = None
        pairs, is_scored = self.pairs, self.pairs.is_scored
        needed = pairs.image_ids
        if len(self.image_ids):
            image_ids, embeddings = dim_zero_cat(self.image_ids).cpu(), dim_zero_cat(self.embeddings).cpu().double()
        else:  # compute before update
            image_ids, embeddings = needed[:0], torch.empty(0, self.pca_components or 0)
        if self.pca_components is not None and self.pca_components > embeddings.shape[1]:
            raise InputError(
                f"pca_components: must be at most {embeddings.shape[1]}, the embedding width, got "
                f"{self.pca_components}; lower it."
            )
        is_valid = torch.isin(image_ids, needed) & embeddings.isfinite().all(dim=1)
        image_ids, embeddings = image_ids[is_valid], embeddings[is_valid]
        is_missing = ~torch.isin(needed, image_ids)
        if is_missing.any():
            rank_zero_warn(
                f"{int(is_missing.sum())} of {len(needed)} images have missing or non-finite embeddings; all pair "
                "metrics are NaN."
            )
            return dict.fromkeys(VERIFICATION_METRICS, torch.tensor(math.nan, dtype=torch.float64))
        by_image = embeddings.new_zeros(int(needed[-1]) + 1, embeddings.shape[1])
        by_image[image_ids] = embeddings  # an image passed twice counts once

        cosine = _pair_cosines(by_image, pairs)
        cosines, fold_accuracies = torch.zeros_like(cosine), []
        for fold in self._scored_folds():
            in_fold = pairs.fold == fold
            if self.pca_components is not None:
                pca = PCA(self.pca_components, svd_solver="covariance_eigh")
                pca.fit(by_image[self._pca_image_ids(in_fold)].numpy())
                cosine = _pair_cosines(torch.from_numpy(pca.transform(by_image.numpy())), pairs)
            accepted = cosine > _best_threshold(cosine[~in_fold], pairs.same[~in_fold])
            fold_accuracies.append((accepted == pairs.same)[in_fold].double().mean())
            cosines[in_fold] = cosine[in_fold]
        accuracies = torch.stack(fold_accuracies)
        accuracy = accuracies.mean()
        if len(accuracies) > 1:
            standard_error = accuracies.std() / math.sqrt(len(accuracies))
        else:
            standard_error = (accuracy * (1 - accuracy) / is_scored.sum()).sqrt()
        self.cosines = cosines[is_scored]
        scores, labels = (
            (self.cosines + 1) / 2,
            pairs.same[is_scored].long(),
        )  # torchmetrics takes values outside 0 .. 1 for logits
        fpr, tpr, _ = binary_roc(scores, labels)
        values = (
            accuracy,
            standard_error,
            binary_auroc(scores, labels),
            binary_eer(scores, labels),
            tpr[fpr <= 1e-2].max(),
            tpr[fpr <= 1e-3].max(),
        )
        return {name: value.double() for name, value in zip(VERIFICATION_METRICS, values, strict=True)}

    def _scored_folds(self) -> list[int]:
        folds: list[int] = torch.unique(self.pairs.fold[self.pairs.is_scored]).tolist()
        return folds

    def _pca_image_ids(self, in_fold: Tensor) -> Tensor:
        """Return the images to fit a PCA on while a fold is scored."""
        image_ids = self.pairs[~in_fold].image_ids
        return image_ids[~torch.isin(image_ids, self.pairs[in_fold].image_ids)]


VERIFICATION_METRICS = ("acc", "acc_stderr", "auc", "eer", "tar_at_far_1e-2", "tar_at_far_1e-3")


def _pair_cosines(embeddings: Tensor, pairs: Pairs) -> Tensor:
    return cosine_similarity(embeddings[pairs.first], embeddings[pairs.second]).clamp(-1, 1)


def _best_threshold(cosine: Tensor, same: Tensor) -> Tensor:
    """Return the threshold with the highest accuracy: midway between the last accepted and first rejected cosine."""
    fpr, tpr, thresholds = binary_roc((cosine + 1) / 2, same.long())
    positives = same.sum()
    correct = (tpr * positives).round() - (fpr * (len(same) - positives)).round()
    best = int(correct.argmax())
    thresholds = torch.cat([thresholds, thresholds.new_tensor([-1.0])])  # below the lowest score, to accept all pairs
    return thresholds[best : best + 2].mean() * 2 - 1
