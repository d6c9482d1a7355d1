"""The best checkpoint, also of a run that was moved or continues in another folder."""

from __future__ import annotations

import math
import shutil
from pathlib import Path, PurePath
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..atomic import atomic_path
from ..checkpoints import indexed, read, update_index
from ..compat import CheckpointHooks
from ..errors import InputError


class BestCheckpoint(CheckpointHooks):
    """Keep the best checkpoints by a metric, and an index of the best one beside them.

    The arguments are those of :class:`~lightning.pytorch.callbacks.ModelCheckpoint`. A file that a killed run wrote
    after its last checkpoint is overwritten; Lightning would write ``best-v1.ckpt`` beside it. A ``/`` in a file name,
    such as one from the name of a metric, becomes ``_``; Lightning would create a folder.
    """

    @property
    def state_key(self) -> str:
        """The key of ModelCheckpoint, which earlier releases used."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
        """Return the path of a checkpoint, which is a file directly in the folder."""
        path = super().format_checkpoint_name(*args, **kwargs)
        folder = f"{self.dirpath}/" if self.dirpath else ""
        return folder + path.removeprefix(folder).replace("/", "_")

    def file_exists(self, filepath: str | Path, trainer: Trainer) -> bool:
        """Return whether a file exists that must not be overwritten."""
        exists = super().file_exists(filepath, trainer)
        is_leftover = (
            self.monitor is not None and str(filepath) not in self.best_k_models and Path(filepath).stem != "last"
        )
        return exists and not is_leftover

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the weights of the file again, unless training continues, because a callback may have loaded others.

        ``WeightAveraging``, for example, loads the weights that training continues with. Checkpoint callbacks run last.
        """
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn != "fit":
            trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)

    def restore_best(self, trainer: Trainer) -> None:
        """Read path and score of the best checkpoint from its file, because the ranks that trained may have ended."""
        path = indexed(self.dirpath or Path(str(trainer.log_dir), "checkpoints"), "best")
        if path.is_file():
            self.best_model_path = str(path)
            self.best_model_score = read(path)["callbacks"][self.state_key]["best_model_score"]

    @override
    def after_write(self, trainer: Trainer, filepath: str) -> None:
        if trainer.is_global_zero and "://" not in filepath:
            update_index(Path(filepath).parent, best=Path(self.best_model_path).name)


def relocate(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Replace the paths in the states of :class:`~lightning.pytorch.callbacks.ModelCheckpoint` by paths of this run.

    Lightning recursively deletes files that such a state names, and drops the best score if a folder was moved. This
    function finds the best checkpoints by name in the folder of the callback, or beside the loaded checkpoint, from
    where it copies them. It drops missing checkpoints, and those of a later step than the loaded one, with a warning.

    Args:
        checkpoint: A loaded checkpoint. The states in it are replaced.
        trainer: The Trainer that resumes from it.
    """
    states = checkpoint.get("callbacks", {})
    for callback in trainer.checkpoint_callbacks:
        state = states.get(callback.state_key)
        if isinstance(callback, ModelCheckpoint) and isinstance(state, dict):
            if trainer.is_global_zero:
                state = _relocated(state, callback, Path(str(trainer.ckpt_path)).parent, checkpoint["global_step"])
            states[callback.state_key] = trainer.strategy.broadcast(state)


def _relocated(state: dict[str, Any], callback: ModelCheckpoint, source: Path, global_step: int) -> dict[str, Any]:
    remote = "://" in str(callback.dirpath)
    folder = Path(str(callback.dirpath))
    scores: dict[str, Tensor] = {}
    dropped = []
    for path, score in state.get("best_k_models", {}).items():
        name = PurePath(path).name
        if remote:
            scores[f"{callback.dirpath}/{name}"] = score
            continue
        found = next((place / name for place in (folder, source) if (place / name).is_file()), None)
        if found is None or not _is_until(found, global_step):
            dropped.append(name)
            continue
        if found.parent != folder:
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(found, temporary)
        scores[str(folder / name)] = score
    if dropped:
        rank_zero_warn(f"The best checkpoint in {folder} is chosen without {', '.join(dropped)}: not found there.")
    scores = dict(sorted(scores.items(), key=lambda item: float(item[1]), reverse=callback.mode == "max"))
    best, worst = next(iter(scores), ""), next(reversed(scores), "")
    if best and isinstance(callback, BestCheckpoint) and not remote:
        update_index(folder, best=PurePath(best).name)
    if callback.monitor is None and (latest := folder / PurePath(state["best_model_path"]).name).is_file():
        best = str(latest)
    return state | {
        "dirpath": callback.dirpath,
        "best_k_models": scores,
        "best_model_path": best,
        "best_model_score": scores.get(best),
        "kth_best_model_path": worst,
        "kth_value": scores.get(worst),
        "last_model_path": "",
    }


def _is_until(path: Path, global_step: int) -> bool:
    """Return whether a file is a checkpoint of ``global_step`` or before."""
    try:
        return bool(read(path).get("global_step", math.inf) <= global_step)
    except InputError:
        return False
