"""Class angles and pair verification compared with scikit-learn and naive references."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.metrics import (
    AngleHistogram,
    ClassAngles,
    MeanLoss,
    PairVerification,
    angle_quantile,
    loss_weight,
)
from lsoftmax_lightning.pairs import Pairs


def make_pairs(folds: int = 5, count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return pairs as in LFW, whose folds have separate people with two images each, and the person of each image."""
    generator = torch.Generator().manual_seed(seed)
    rows, people = [], []
    for fold in range(1, folds + 1):
        start = len(people)
        people += [person for person in range(start // 2, start // 2 + count) for _ in range(2)]
        rows += [[start + 2 * i, start + 2 * i + 1, 1, fold] for i in range(count)]
        for _ in range(count):
            first, second = torch.randperm(count, generator=generator)[:2].tolist()
            rows.append([start + 2 * first, start + 2 * second, 0, fold])
    return torch.tensor(rows), torch.tensor(people)


def noisy(people: Tensor, noise: float, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(int(people.max()) + 1, width, generator=generator)
    scale = torch.linspace(2, 0.2, width)  # different variances for PCA
    return (centres[people] + noise * torch.randn(len(people), width, generator=generator)) * scale + 0.3


def metric_values(pairs: Tensor, embeddings: Tensor, **settings: Any) -> dict[str, float]:
    metric = PairVerification(Pairs.from_table(pairs), **settings)
    for image_ids in torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(2)).split(17):
        metric.update(embeddings[image_ids], image_ids)
    return {name: value.item() for name, value in metric.compute().items()}


def naive(pairs: Tensor, embeddings: Tensor, pca_components: int | None) -> dict[str, float]:
    """Compute the protocol with loops over all thresholds, and scikit-learn for PCA and ROC."""
    rows = pairs.tolist()
    accuracies, scores, labels = [], [], []
    for fold in sorted({row[3] for row in rows} - {0}):
        vectors = embeddings.double().numpy()
        if pca_components:
            scored = {image for row in rows if row[3] == fold for image in row[:2]}
            seen = sorted({image for row in rows if row[3] != fold for image in row[:2]} - scored)
            vectors = PCA(pca_components, svd_solver="full").fit(vectors[seen]).transform(vectors)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = [float(vectors[a] @ vectors[b]) for a, b, _, _ in rows]
        fitted = sorted((c, row[2]) for c, row in zip(cosines, rows, strict=True) if row[3] != fold)
        values = [c for c, _ in fitted]
        candidates = [2.0, *((a + b) / 2 for a, b in itertools.pairwise(values)), -2.0]
        best = max(candidates, key=lambda t: (sum((c > t) == bool(same) for c, same in fitted), t))
        held_out = [(c, row[2]) for c, row in zip(cosines, rows, strict=True) if row[3] == fold]
        accuracies.append(np.mean([(c > best) == bool(same) for c, same in held_out]))
        scores += [c for c, _ in held_out]
        labels += [same for _, same in held_out]
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    nearest = np.argmin(np.abs(fpr - (1 - tpr)))
    return {
        "acc": float(np.mean(accuracies)),
        "acc_stderr": float(np.std(accuracies, ddof=1) / math.sqrt(len(accuracies))),
        "auc": float(roc_auc_score(labels, scores)),
        "eer": float((fpr[nearest] + 1 - tpr[nearest]) / 2),
        "tar_at_far_1e-2": float(tpr[fpr <= 1e-2].max()),
        "tar_at_far_1e-3": float(tpr[fpr <= 1e-3].max()),
    }


@pytest.mark.parametrize("pca_components", [None, 3, 12])
@pytest.mark.parametrize("noise", [0.2, 0.6, 1.5])
def test_metrics_equal_a_naive_protocol(noise: float, pca_components: int | None) -> None:
    pairs, people = make_pairs()
    embeddings = noisy(people, noise)
    found = metric_values(pairs, embeddings, pca_components=pca_components)
    assert found == pytest.approx(naive(pairs, embeddings, pca_components), abs=1e-6)
    assert 0.55 < found["acc"] < 1 or noise == 0.2


def test_random_embeddings_score_a_half() -> None:
    pairs, people = make_pairs(folds=10, count=300)  # as LFW: 6,000 pairs
    found = metric_values(pairs, torch.randn(len(people), 64, generator=torch.Generator().manual_seed(0)))
    assert found["acc"] == pytest.approx(0.5, abs=0.03)
    assert found["auc"] == pytest.approx(0.5, abs=0.03)
    assert found["eer"] == pytest.approx(0.5, abs=0.03)
    assert found["tar_at_far_1e-2"] < 0.05


@pytest.mark.parametrize("pca_components", [None, 5])
def test_identical_embeddings_of_a_person_score_perfectly(pca_components: int | None) -> None:
    pairs, people = make_pairs()
    found = metric_values(pairs, noisy(people, noise=0), pca_components=pca_components)
    expected = {"acc": 1, "acc_stderr": 0, "auc": 1, "eer": 0, "tar_at_far_1e-2": 1, "tar_at_far_1e-3": 1}
    assert found == pytest.approx(expected)


def test_identical_embeddings_of_all_people_score_chance() -> None:
    pairs, people = make_pairs()
    found = metric_values(pairs, torch.ones(len(people), 4))
    assert (found["acc"], found["auc"]) == (0.5, 0.5)


def test_no_image_of_the_scored_fold_fits_the_pca() -> None:
    pairs, people = make_pairs(folds=3, count=20)
    pairs[-1, 0] = pairs[0, 0]  # a pair of fold 3 with an image of fold 1
    embeddings = noisy(people, noise=1.5)
    embeddings[pairs[0, 0]] *= 50  # dominates PCA if it is used for fitting
    found = metric_values(pairs, embeddings, pca_components=4)
    assert found == pytest.approx(naive(pairs, embeddings, 4), abs=1e-6)


def test_threshold_may_accept_all_pairs() -> None:
    rows = [[4 * i + j, 4 * i + j + 1, int(j < 3), i % 5 + 1] for i in range(20) for j in range(4)]
    pairs = torch.tensor(rows)
    assert metric_values(pairs, torch.ones(81, 3))["acc"] == 0.75


def test_standard_error_of_one_fold_is_that_of_a_proportion() -> None:
    pairs, people = make_pairs(folds=3)
    pairs[pairs[:, 3] < 3, 3] = 0
    found = metric_values(pairs, noisy(people, noise=0.6))
    assert found["acc_stderr"] == pytest.approx(math.sqrt(found["acc"] * (1 - found["acc"]) / 120))
    assert 0 < found["acc_stderr"] < 0.05


def test_an_image_given_twice_counts_once() -> None:
    pairs, people = make_pairs()
    embeddings = noisy(people, noise=0.6)
    once, twice = PairVerification(Pairs.from_table(pairs)), PairVerification(Pairs.from_table(pairs))
    image_ids = torch.arange(len(embeddings))
    once.update(embeddings, image_ids)
    for _ in range(2):
        twice.update(embeddings, image_ids)
    assert once.compute() == twice.compute()


def test_half_precision_embeddings_are_accepted() -> None:
    pairs, people = make_pairs()
    embeddings = noisy(people, noise=0.6)
    exact, half = metric_values(pairs, embeddings), metric_values(pairs, embeddings.bfloat16())
    assert half["auc"] == pytest.approx(exact["auc"], abs=0.01)


def test_images_in_no_pair_are_ignored() -> None:
    pairs, people = make_pairs()
    embeddings = noisy(people, noise=0.6)
    assert metric_values(pairs, torch.cat([embeddings, embeddings[:3]])) == metric_values(pairs, embeddings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pca_components", [None, 3])
def test_embeddings_that_are_not_finite_give_nan(value: float, pca_components: int | None) -> None:
    pairs, people = make_pairs()
    embeddings = noisy(people, noise=0.6)
    embeddings[5, 3] = value
    with pytest.warns(UserWarning, match="1 of .* images have missing or non-finite embeddings"):
        found = metric_values(pairs, embeddings, pca_components=pca_components)
    assert all(math.isnan(value) for value in found.values())


def test_missing_images_give_nan_and_a_warning() -> None:
    pairs, people = make_pairs()
    metric = PairVerification(Pairs.from_table(pairs))
    metric.update(noisy(people, 0.5)[:100], torch.arange(100))
    with pytest.warns(UserWarning, match="500 of 600 images have missing or non-finite embeddings"):
        assert all(math.isnan(value) for value in metric.compute().values())


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), r"int64 \(P, 4\)"),
        (torch.zeros(4, 4), "float32"),
        (torch.tensor([[0, 1, 1, 1], [-1, 1, 0, 2]]), "not negative"),
        (torch.tensor([[0, 1, 1, 1], [2, 3, 1, 2]]), "both same and different"),
        (torch.tensor([[0, 1, 1, 1], [2, 3, 2, 2]]), "1 for same and 0 for different"),
        (torch.tensor([[0, 1, 1, 1], [2, 3, 0, 1]]), "of other folds"),
        (torch.tensor([[0, 1, 1, 0], [2, 3, 0, 0]]), "both same and different"),
        (
            torch.tensor([[0, 1, 1, 1], [2, 3, 0, 2]]),
            "fold 1 must be fitted on both same and different .* got 0 same pairs of 1",
        ),
        (torch.tensor([[0, 1, 1, 1], [2, 3, 0, 2], [4, 5, 0, 1]]), "fold 1 must be fitted on both"),
    ],
)
def test_invalid_pairs_are_rejected(pairs: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PairVerification(Pairs.from_table(pairs))


def test_invalid_pca_components_are_rejected() -> None:
    pairs, people = make_pairs(folds=2, count=10)
    for components in (0, 20, 21):
        with pytest.raises(InputError, match=f"at least 1 and below 20, the number of .*, got {components}"):
            PairVerification(Pairs.from_table(pairs), pca_components=components)
    with pytest.raises(InputError, match="pca_components: must be at most 12, the embedding width, got 13"):
        metric_values(pairs, noisy(people, 0.5), pca_components=13)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric PairVerification was called before")
def test_metrics_without_images_are_nan() -> None:
    metric = PairVerification(Pairs.from_table(make_pairs()[0]), pca_components=3)
    with pytest.warns(UserWarning, match="600 of 600 images have missing or non-finite embeddings"):
        assert all(math.isnan(value) for value in metric.compute().values())


def test_reset_removes_the_cosines() -> None:
    pairs, people = make_pairs()
    metric = PairVerification(Pairs.from_table(pairs))
    metric.update(noisy(people, 0.5), torch.arange(len(people)))
    metric.compute()
    metric.reset()
    assert metric.cosines is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_exact_in_any_precision_and_inference_mode(dtype: torch.dtype) -> None:
    features, target = torch.randn(300, 8), torch.arange(300) % 3
    expected = ClassAngles(3, 8, 2)
    expected.update(features, torch.eye(3, 8), target)
    metric = ClassAngles(3, 8, 2).to(dtype)
    with torch.inference_mode():
        metric.reset()
        metric.update(features[:100], torch.eye(3, 8), target[:100])
    metric.update(features[100:200], torch.eye(3, 8), target[100:200])
    with torch.inference_mode():
        metric.update(features[200:], torch.eye(3, 8), target[200:])
    torch.testing.assert_close(metric.compute(), expected.compute())


def test_angles_of_diverged_features_are_nan() -> None:
    metric = ClassAngles(2, 2, 2)
    metric.update(torch.full((2, 2), math.nan), torch.eye(2), torch.tensor([0, 1]))
    values = metric.compute()
    assert values["angle"].isnan()
    assert values["feature_norm"].isnan()


def test_samples_are_counted_exactly() -> None:
    metric = ClassAngles(2, 2, 1)
    metric.segments += 2**24
    metric.update(torch.ones(1, 2), torch.eye(2), torch.tensor([0]))
    assert metric.segments.tolist() == [2**24 + 1]


@pytest.mark.parametrize("margin", [1, 4])
def test_angles_of_classes_do_not_depend_on_the_batches(margin: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, target = torch.randn(5, 3, generator=generator), torch.arange(40) % 4  # no sample of class 4
    features = torch.randn(40, 3, generator=generator)
    metric = ClassAngles(5, 3, margin)
    for rows in torch.arange(40).split(7):
        metric.update(features[rows], weight, target[rows])
    found = {name: value.item() for name, value in metric.compute().items()}

    theta = torch.arccos(torch.cosine_similarity(features, weight[target])).numpy()
    unit = features / features.norm(dim=1, keepdim=True)
    centres = torch.stack([unit[target == label].mean(0) for label in range(4)])
    between = {
        (i, j): float(torch.rad2deg(torch.arccos(torch.cosine_similarity(centres[i], centres[j], dim=0))))
        for i, j in itertools.permutations(range(4), 2)
    }
    nearest = [min(angle for (i, _), angle in between.items() if i == label) for label in range(4)]
    fractions = [np.mean((theta >= k * math.pi / margin) & (theta < (k + 1) * math.pi / margin)) for k in range(margin)]
    assert found == pytest.approx(
        {
            "angle": np.degrees(theta).mean(),
            "feature_norm": features.norm(dim=1).mean().item(),
            "centre_angle_mean": np.mean(list(between.values())),
            "centre_angle_nearest": np.mean(nearest),
            "centre_angle_min": min(between.values()),
            **{f"segment_{k}": fraction for k, fraction in enumerate(fractions)},
        },
        rel=1e-4,
    )
    assert sum(fractions) == pytest.approx(1)


def test_opposite_features_are_in_the_last_segment() -> None:
    metric = ClassAngles(2, 2, 3)
    metric.update(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.eye(2), torch.tensor([0, 0]))
    values = metric.compute()
    assert [values[f"segment_{k}"].item() for k in range(3)] == [0.5, 0, 0.5]
    assert math.isnan(values["centre_angle_mean"])  # of a single class


def test_compute_stores_the_cosines_of_the_scored_pairs() -> None:
    pairs, people = make_pairs(folds=3)
    pairs[pairs[:, 3] == 3, 3] = 0
    embeddings = noisy(people, 0.5)
    metric = PairVerification(Pairs.from_table(pairs))
    metric.update(embeddings, torch.arange(len(embeddings)))
    metric.compute()
    first, second = embeddings[pairs[pairs[:, 3] > 0, :2]].unbind(1)
    torch.testing.assert_close(metric.cosines, torch.cosine_similarity(first.double(), second.double()))


def test_the_mean_loss_weighs_batches_by_their_size_and_keeps_nan() -> None:
    loss = MeanLoss()
    loss.update(torch.tensor(1.0), 3)
    loss.update(torch.tensor(2.0), 1)
    loss.update(torch.tensor(float("nan")), 0)
    assert loss.compute() == 1.25
    loss.update(torch.tensor(float("nan")), 2)
    assert loss.compute().isnan()


@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 10.0, 0.5])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_loss_equals_the_loss_of_one_batch(ignored: int, weight: Tensor | None, smoothing: float) -> None:
    criterion = nn.CrossEntropyLoss(weight, ignore_index=ignored, label_smoothing=smoothing)
    logits, target = torch.randn(60, 3), torch.arange(60) // 20
    loss = MeanLoss()
    for part in torch.arange(60).split(7):  # a batch has only the ignored class
        loss.update(criterion(logits[part], target[part]), loss_weight(criterion, target[part]))
    torch.testing.assert_close(loss.compute(), criterion(logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_loss_is_exact_in_a_module_of_half_precision(dtype: torch.dtype) -> None:
    loss = MeanLoss().to(dtype=dtype)
    for number in range(400):
        loss.update(torch.tensor(1.0 + number % 2, dtype=dtype), 256)
    assert loss.compute() == 1.5


def test_the_quantile_of_a_histogram_of_angles_is_within_a_bin_of_the_exact_one() -> None:
    angles = 180 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    metric = AngleHistogram()
    for batch in [*angles.split(300), torch.tensor([math.nan, math.inf])]:
        metric.update(batch)
    assert metric.compute().sum() == 1000
    for q in (0.001, 0.5, 0.95, 1.0):
        exact = angles.sort().values[math.ceil(q * 1000) - 1].item()
        assert exact <= angle_quantile(metric.compute(), q) <= exact + 0.1001
    metric = AngleHistogram()
    metric.update(torch.tensor([180.0]))
    assert angle_quantile(metric.compute(), 1) == 180
