"""Scalars that the monitor logs, and the charts that show them on TensorBoard."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Separation, effective_margin, evenly_spaced, segment_counts, separation, target_angles
from ..heads import LSoftmaxLinear


def training_scalars(head: LSoftmaxLinear, features: Tensor, target: Tensor) -> dict[str, Tensor | float]:
    """Return the scalars of a training batch, by tag.

    Args:
        head: The head.
        features: x, ``(N, D)``.
        target: Class of each sample, int64, ``(N,)``.
    """
    angles = target_angles(features, head.class_weights(target))
    segments = segment_counts(angles, head.margin) / len(angles)
    return {
        "train/cross_entropy": head.plain_cross_entropy(features, target),
        "train/angle": angles.mean(),
        "train/feature_norm": torch.linalg.vector_norm(features.float(), dim=1).mean(),
        **{f"train/segment_{k}": fraction for k, fraction in enumerate(segments)},
        "effective_margin": effective_margin(head.margin, head.lambda_),
    }


def weight_scalars(head: LSoftmaxLinear) -> dict[str, Tensor]:
    """Return the scalars of the class weights, by tag without its stage; call it on all ranks."""
    return {f"weight_angle_{name}": angle for name, angle in weight_separation(head)._asdict().items()}


def weight_separation(head: LSoftmaxLinear) -> Separation:
    """Return the angles between the class weights, of at most 10,000 classes; call it on all ranks."""
    return separation(head.class_weights(evenly_spaced(head.num_classes).to(head.weight.device)))


def layout(has_pairs: bool, follows_accuracy: bool) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Return the layout of the Custom Scalars tab: by category and title, the regular expressions of the tags.

    Args:
        has_pairs: Whether the validation is on pairs of images.
        follows_accuracy: Whether lambda follows the training accuracy.
    """
    annealing = {"lambda": "lambda$"}
    if follows_accuracy:
        annealing["accuracy with the margin, which sets lambda"] = "train/margin_acc$"
    annealing |= {"effective margin": "effective_margin$", "learning rate": "lr$"}

    # TensorBoard colours a curve by its run alone, so training and validation have charts of their own.
    training = {
        "loss with the margin": "train/loss$",
        "plain cross-entropy": "train/cross_entropy$",
        "accuracy": "train/acc$",
        "angle of a sample to its class weight, degrees": "train/angle$",
        "norm of a feature": "train/feature_norm$",
    }
    separability = {"angle between class weights": "val/weight_angle_"}
    if has_pairs:
        validation = {
            "accuracy": "val/acc$",
            "area under the ROC curve": "val/auc$",
            "equal error rate": "val/eer$",
            "true accept rate at a low false accept rate": "val/tar_at_far_",
        }
    else:
        validation = {
            "loss with the margin": "val/margin_loss$",
            "plain cross-entropy": "val/loss$",
            "accuracy": "val/acc$",
            "angle of a sample to its class weight, degrees": "val/angle$",
            "norm of a feature": "val/feature_norm$",
        }
        separability["angle between class centres"] = "val/centre_angle_"
    categories = {
        "Training": training,
        "Validation": validation,
        "Annealing": annealing,
        "Separability": separability,
        "Speed": {"images per second": "images_per_second$"},
    }
    return {
        category: {title: ("Multiline", [tag]) for title, tag in charts.items()}
        for category, charts in categories.items()
    }
