"""The checkpoint that is tested."""

from __future__ import annotations

from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..checkpoints import update_index


class BestCheckpoint(ModelCheckpoint):
    """Keep the best checkpoints by a metric, and an index of the best one beside them.

    The arguments are those of :class:`~lightning.pytorch.callbacks.ModelCheckpoint`. A file that a killed run left
    beyond its last checkpoint is overwritten: Lightning would write ``best-v1.ckpt`` beside it.
    """

    @property
    def state_key(self) -> str:
        """The key of ModelCheckpoint, which earlier releases used."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def file_exists(self, filepath: str | Path, trainer: Trainer) -> bool:
        """Return whether a file exists that must not be overwritten."""
        exists = super().file_exists(filepath, trainer)
        is_leftover = (
            self.monitor is not None and str(filepath) not in self.best_k_models and Path(filepath).stem != "last"
        )
        return exists and not is_leftover

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero and "://" not in filepath:
            update_index(Path(filepath).parent, best=Path(self.best_model_path).name)
