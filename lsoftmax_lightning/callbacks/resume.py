"""Going on where a run stopped."""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer


class EpochCount(Callback):
    """Has a run of ``max_steps`` that is resumed at the end of an epoch go on with the next one.

    From the checkpoint of an epoch's end Lightning 2.6 counts that epoch twice where
    ``max_steps`` is set: the shuffle of the next one is left out, and ``max_epochs`` ends the run an epoch early.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Takes back the first count, which the Trainer makes again."""
        if trainer.max_steps == -1:
            return
        for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            if counts["processed"] == counts["completed"] + 1:
                counts["processed"] -= 1
