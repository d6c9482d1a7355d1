"""The softmax run beside a run with a margin, for comparison."""

from __future__ import annotations

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

ANGLE_BINS = range(181)
"""Edges of the bins of the angles' histograms, in degrees."""


def softmax_angles(run: Path, stage: str) -> dict[str, Tensor]:
    """The angles of samples to their class in the latest run at m = 1 that lies in the same folder as ``run``.

    Args:
        run: Folder of a run, with the ``hparams.yaml`` that Lightning leaves in it.
        stage: ``train``, ``val`` or ``test``.

    Returns:
        Under the name of that run, the angles as they were when it ended, [N], to the width of a bin; nothing where
        there is no such run.
    """
    for hparams in sorted(run.parent.glob("*/hparams.yaml"), key=lambda path: path.stat().st_mtime, reverse=True):
        if hparams.parent == run or "margin: 1" not in hparams.read_text().splitlines():
            continue
        events = EventAccumulator(str(hparams.parent), size_guidance={"histograms": 1, "images": 1}).Reload()
        if f"angles/{stage}" in events.Tags()["histograms"]:
            histogram = events.Histograms(f"angles/{stage}")[-1].histogram_value
            middles = torch.tensor(histogram.bucket_limit) - ANGLE_BINS.step / 2
            angles = middles.repeat_interleave(torch.tensor(histogram.bucket).long())
            return {f"{stage} of softmax ({hparams.parent.name})": angles}
    return {}
