"""Angles of another run, to compare a margin with softmax."""

from __future__ import annotations

import errno
import re
import stat
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

ANGLE_BINS = range(181)
"""Edges of the bins of histograms of angles, in degrees."""


def baseline_angles(run: Path, margin: int, stage: str) -> dict[str, Tensor]:
    """Return the angles of samples to their class in the latest run with m = 1 in the same folder as ``run``.

    If ``run`` itself has m = 1, the latest run with a margin is used. Unreadable runs are skipped with a warning.

    Args:
        run: Folder of a run, or of a test inside it. Other runs are found by their ``hparams.yaml``.
        margin: m of the run.
        stage: ``train``, ``val`` or ``test``.

    Returns:
        The last angles of that run by its name, in degrees, ``(N,)``, rounded to the middle of their bin; empty without
        such a run.
    """
    if (run.parent / "config.yaml").is_file():  # a test has a folder inside that of its run
        run = run.parent
    for hparams in sorted(run.parent.glob("*/hparams.yaml"), key=_modified, reverse=True):
        if hparams.parent == run:
            continue
        path = hparams
        try:
            found = re.search(r"^margin: (\d+)$", _read_text(hparams), re.MULTILINE)
            if found is None or (found[1] == "1") == (margin == 1):
                continue
            path = hparams.parent  # for the warning, because errors in event files do not name the file
            angles = _final_angles(path, stage)
        except Exception as error:  # a damaged event file raises many types
            cause = str(error) or type(error).__name__
            rank_zero_warn(f"{path} cannot be read, so the angles of this run are not shown for comparison: {cause}")
            continue
        if angles is not None:
            return {f"{stage} of {'softmax' if found[1] == '1' else f'm = {found[1]}'} ({path.name})": angles}
    return {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a broken link, or a run that is being removed
        return 0.0


def _read_text(path: Path) -> str:
    _check_regular(path)
    return path.read_text(encoding="utf-8")


def _final_angles(run: Path, stage: str) -> Tensor | None:
    """Return the angles of the last histogram in a run's event files."""
    for path in run.glob("*tfevents*"):
        _check_regular(path)
    events = EventAccumulator(str(run), size_guidance={"histograms": 1, "images": 1}).Reload()
    if f"angles/{stage}" not in events.Tags()["histograms"]:
        return None
    histogram = events.Histograms(f"angles/{stage}")[-1].histogram_value
    middles = torch.tensor(histogram.bucket_limit) - ANGLE_BINS.step / 2
    return middles.repeat_interleave(torch.tensor(histogram.bucket).long())


def _check_regular(path: Path) -> None:
    """Raise OSError unless the path is a regular file, because opening a FIFO could block forever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
