"""Length of a run, for schedules that depend on it."""

from __future__ import annotations

import math

from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def run_length(trainer: Trainer) -> float:
    """Return the number of optimiser steps of the whole run, with the gradient accumulation of each epoch.

    Args:
        trainer: The Trainer, after its training data are loaded. Its ``estimated_stepping_batches`` assumes the
            accumulation of the current epoch for all epochs, and changes during the run.

    Returns:
        Number of steps, including those before a resume; infinite or -1 if it is unknown.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
    if not schedulers or epochs == -1 or batches == math.inf:
        return trainer.estimated_stepping_batches
    # Lightning applies the last of several schedulers
    steps = sum(math.ceil(batches / schedulers[-1].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
