"""Groups, labels and units of the metrics, for tables."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_PERCENT, _DEGREES, _PLAIN = "%", "°", ""
_METRICS = {  # label and unit, by group and by name without the stage
    "Accuracy and loss": {
        "acc": ("accuracy", _PERCENT),
        "acc_stderr": ("accuracy, standard error of the folds", _PERCENT),
        "margin_acc": ("accuracy with the margin", _PERCENT),
        "loss": ("cross-entropy without the margin", _PLAIN),
        "margin_loss": ("loss with the margin", _PLAIN),
        "auc": ("area under the ROC curve", _PLAIN),
        "eer": ("equal error rate", _PERCENT),
        "tar_at_far_1e-2": ("same pairs accepted, at 1 % false accepts", _PERCENT),
        "tar_at_far_1e-3": ("same pairs accepted, at 0.1 % false accepts", _PERCENT),
    },
    "Compactness": {
        "angle": ("mean angle of a sample to its class weight", _DEGREES),
        "feature_norm": ("mean norm of a feature", _PLAIN),
    },
    "Separation": {
        f"{subject}_angle_{statistic}": (f"angle between class {subject}s, {description}", _DEGREES)
        for subject in ("centre", "weight")
        for statistic, description in (("nearest", "nearest class"), ("mean", "mean"), ("min", "smallest"))
    },
}


def labelled(metrics: Mapping[str, float | Tensor]) -> dict[str, list[tuple[str, str]]]:
    """Return labels and rounded values with units, by group. Empty groups are omitted.

    Args:
        metrics: Metrics by name, such as ``test/acc``. Fractions of samples in a segment of psi are omitted.
    """
    rest = {name.partition("/")[2] or name: float(value) for name, value in metrics.items() if "/segment_" not in name}
    groups = {
        group: [(label, _rounded(rest.pop(name), unit)) for name, (label, unit) in known.items() if name in rest]
        for group, known in _METRICS.items()
    }
    groups["Other metrics"] = [(name, _rounded(value, _PLAIN)) for name, value in rest.items()]
    return {group: rows for group, rows in groups.items() if rows}


def _rounded(value: float, unit: str) -> str:
    if unit == _PERCENT:
        return f"{100 * value:.2f} %"
    return f"{value:.1f}°" if unit == _DEGREES else f"{value:.4g}"
