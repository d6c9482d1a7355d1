"""Pair verification, against scikit-learn and a naive reference."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.metrics import PairVerification


def make_pairs(folds: int = 5, count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs in LFW's layout, each fold with people of its own, two images each; and the person of each image."""
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
    scale = torch.linspace(2, 0.2, width)  # so that PCA has something to choose
    return (centres[people] + noise * torch.randn(len(people), width, generator=generator)) * scale + 0.3


def figures(pairs: Tensor, embeddings: Tensor, **settings: Any) -> dict[str, float]:
    metric = PairVerification(pairs, **settings)
    for numbers in torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(2)).split(17):
        metric.update(embeddings[numbers], numbers)
    return {name: value.item() for name, value in metric.compute().items()}


def naive(pairs: Tensor, embeddings: Tensor, pca_components: int | None) -> dict[str, float]:
    """The protocol in its own words: loops, every threshold tried, scikit-learn for PCA and ROC."""
    rows = pairs.tolist()
    accuracies, scores, labels = [], [], []
    for fold in sorted({row[3] for row in rows} - {0}):
        vectors = embeddings.double().numpy()
        if pca_components:
            seen = sorted({number for row in rows if row[3] != fold for number in row[:2]})
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
def test_it_is_the_protocol(noise: float, pca_components: int | None) -> None:
    pairs, people = make_pairs()
    embeddings = noisy(people, noise)
    found = figures(pairs, embeddings, pca_components=pca_components)
    assert found == pytest.approx(naive(pairs, embeddings, pca_components), abs=1e-6)
    assert 0.55 < found["acc"] < 1 or noise == 0.2


def test_random_embeddings_score_a_half() -> None:
    pairs, people = make_pairs(folds=10, count=300)  # as LFW: 6,000 pairs
    found = figures(pairs, torch.randn(len(people), 64, generator=torch.Generator().manual_seed(0)))
    assert found["acc"] == pytest.approx(0.5, abs=0.03)
    assert found["auc"] == pytest.approx(0.5, abs=0.03)
    assert found["eer"] == pytest.approx(0.5, abs=0.03)
    assert found["tar_at_far_1e-2"] < 0.05


@pytest.mark.parametrize("pca_components", [None, 5])
def test_identical_embeddings_of_a_person_score_all(pca_components: int | None) -> None:
    pairs, people = make_pairs()
    found = figures(pairs, noisy(people, noise=0), pca_components=pca_components)
    expected = {"acc": 1, "acc_stderr": 0, "auc": 1, "eer": 0, "tar_at_far_1e-2": 1, "tar_at_far_1e-3": 1}
    assert found == pytest.approx(expected)


def test_the_same_embedding_for_everybody_is_worth_nothing() -> None:
    pairs, people = make_pairs()
    found = figures(pairs, torch.ones(len(people), 4))
    assert (found["acc"], found["auc"]) == (0.5, 0.5)


def test_the_scored_fold_has_no_say_in_threshold_and_pca() -> None:
    # fold 2 is scaled and turned, so that a threshold or a PCA that saw it would be another for fold 1
    pairs, people = make_pairs(folds=2)
    embeddings = noisy(people, noise=0.5)
    alone = pairs[:, 3] == 1
    fitted_on_two = torch.cat([pairs[alone], pairs[~alone] * torch.tensor([1, 1, 1, 0])])
    images_of_one = torch.unique(pairs[alone][:, :2])
    before = PairVerification(fitted_on_two, pca_components=4)
    before.update(embeddings, torch.arange(len(embeddings)))
    seen = before.compute()["acc"]
    noise = torch.randn(len(images_of_one), embeddings.shape[1]) * 100
    embeddings[images_of_one[len(images_of_one) // 2 :]] = noise[len(images_of_one) // 2 :]
    unaffected = torch.isin(pairs[:, 0], images_of_one[: len(images_of_one) // 2]) & alone
    unaffected &= torch.isin(pairs[:, 1], images_of_one[: len(images_of_one) // 2])
    assert 0 < unaffected.sum() < alone.sum()
    metrics = []
    for table in (noisy(people, noise=0.5), embeddings):
        kept = torch.cat([pairs[unaffected], fitted_on_two[fitted_on_two[:, 3] == 0]])
        metric = PairVerification(kept, pca_components=4)
        metric.update(table, torch.arange(len(table)))
        metrics.append(metric.compute()["acc"])
    assert metrics[0] == metrics[1]
    assert 0.5 < seen < 1


def test_one_scored_fold_has_the_error_of_a_share() -> None:
    pairs, people = make_pairs(folds=3)
    pairs[pairs[:, 3] < 3, 3] = 0
    found = figures(pairs, noisy(people, noise=0.6))
    assert found["acc_stderr"] == pytest.approx(math.sqrt(found["acc"] * (1 - found["acc"]) / 120))
    assert 0 < found["acc_stderr"] < 0.05


def test_an_image_given_twice_counts_once() -> None:
    pairs, people = make_pairs()
    embeddings = noisy(people, noise=0.6)
    once, twice = PairVerification(pairs), PairVerification(pairs)
    numbers = torch.arange(len(embeddings))
    once.update(embeddings, numbers)
    for _ in range(2):
        twice.update(embeddings, numbers)
    assert once.compute() == twice.compute()


def test_half_precision_is_taken() -> None:
    pairs, people = make_pairs()
    embeddings = noisy(people, noise=0.6)
    exact, half = figures(pairs, embeddings), figures(pairs, embeddings.bfloat16())
    assert half["auc"] == pytest.approx(exact["auc"], abs=0.01)


def test_missing_images_give_no_figures_and_a_warning() -> None:
    pairs, people = make_pairs()
    metric = PairVerification(pairs)
    metric.update(noisy(people, 0.5)[:100], torch.arange(100))
    with pytest.warns(UserWarning, match="500 of 600 images were not embedded"):
        assert all(math.isnan(value) for value in metric.compute().values())


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), r"int64 \[P, 4\]"),
        (torch.zeros(4, 4), "float32"),
        (torch.tensor([[0, 1, 1, 1], [-1, 1, 0, 2]]), "none below 0"),
        (torch.tensor([[0, 1, 1, 1], [2, 3, 1, 2]]), "same .* and different"),
        (torch.tensor([[0, 1, 1, 1], [2, 3, 2, 2]]), "same .* and different"),
        (torch.tensor([[0, 1, 1, 1], [2, 3, 0, 1]]), "leave none to fit"),
        (torch.tensor([[0, 1, 1, 0], [2, 3, 0, 0]]), "same .* and different"),
    ],
)
def test_bad_pairs_are_refused(pairs: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        PairVerification(pairs)


def test_bad_components_are_refused() -> None:
    pairs, people = make_pairs()
    with pytest.raises(InputError, match="pca_components must be at least 1, got 0"):
        PairVerification(pairs, pca_components=0)
    with pytest.raises(InputError, match=r"PCA to 13 components .* 12 features"):
        figures(pairs, noisy(people, 0.5), pca_components=13)
