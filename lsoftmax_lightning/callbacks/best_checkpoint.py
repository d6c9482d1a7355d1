"""The best checkpoint, also of a run whose folder was moved or that continues in another folder."""

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
    """Keep the best checkpoints by a metric, and an index of the best one next to them.

    The arguments are those of :class:`~lightning.pytorch.callbacks.ModelCheckpoint`. A file that a killed run wrote
    after its last checkpoint is overwritten, whereas Lightning writes ``best-v1.ckpt`` next to it. A ``/`` in a file
    name, for example from the name of a metric, becomes ``_``, whereas Lightning creates a folder. If several callbacks
    share a folder, the index names the best checkpoint of the last one.
    """

    @property
    def state_key(self) -> str:
        """State key of ModelCheckpoint, for checkpoints of earlier releases."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
        """Return the path of a checkpoint, directly in the folder."""
        path = super().format_checkpoint_name(*args, **kwargs)
        folder = f"{str(self.dirpath).rstrip('/')}/" if self.dirpath else ""
        return folder + path.removeprefix(folder).replace("/", "_")

    def file_exists(self, filepath: str | Path, trainer: Trainer) -> bool:
        """Return whether the file exists and must not be overwritten."""
        exists = super().file_exists(filepath, trainer)
        kept = {path for each in model_checkpoints(trainer) for path in (*each.best_k_models, each.best_model_path)}
        is_leftover = self.monitor is not None and str(filepath) not in kept and Path(filepath).stem != "last"
        return exists and not is_leftover

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the weights of the file again, unless training continues, because a callback may have loaded others.

        ``WeightAveraging``, for example, loads the weights that training continues with. Checkpoint callbacks run last.
        """
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn != "fit":
            trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)

    def restore_best(self, trainer: Trainer) -> None:
        """Read path and score of the best checkpoint from files, because the training processes may have ended.

        With ``save_weights_only``, its score is only in the last checkpoint.
        """
        run = Path(str(trainer.log_dir), "checkpoints")
        path = indexed(self.dirpath or run, "best")
        if not path.is_file():
            return
        self.best_model_path = str(path)
        for file in (path, indexed(run, "last")):
            state = read(file).get("callbacks", {}).get(self.state_key, {}) if file.is_file() else {}
            if PurePath(state.get("best_model_path", "")).name == path.name:
                self.best_model_score = state["best_model_score"]
                return

    @override
    def after_write(self, trainer: Trainer, filepath: str) -> None:
        in_folder = [c for c in model_checkpoints(trainer) if c.dirpath == self.dirpath and c.best_model_path]
        last = [callback for callback in in_folder if isinstance(callback, BestCheckpoint)][-1]
        if trainer.is_global_zero and "://" not in filepath and last is self:
            update_index(Path(filepath).parent, best=Path(self.best_model_path).name)


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the callbacks of a Trainer that have a folder of checkpoints."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def relocate(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Replace the paths in the states of :class:`~lightning.pytorch.callbacks.ModelCheckpoint` by paths of this run.

    Lightning recursively deletes paths that such a state names, and drops the best score if the folder was moved. This
    function searches the best checkpoints by name in the folder of the callback, then in the folder of the loaded
    checkpoint, from where it copies them. It drops missing checkpoints and those later than the loaded one, with a
    warning.

    Args:
        checkpoint: A loaded checkpoint. The states in it are replaced.
        trainer: The Trainer that resumes from it.
    """
    states = checkpoint.get("callbacks", {})
    for callback in model_checkpoints(trainer):
        state = states.get(callback.state_key)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            states.pop(callback.state_key, None)  # it writes no checkpoints
        elif isinstance(state, dict):
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
        if found is None or _is_later(found, global_step):
            dropped.append(name)
            continue
        if found.parent != folder:
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(found, temporary)
        scores[str(folder / name)] = score
    if dropped:
        names = ", ".join(dropped)
        rank_zero_warn(
            f"The best checkpoint in {folder} is chosen without {names}: missing, or later than the resumed step."
        )
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


def _is_later(path: Path, global_step: int) -> bool:
    """Return whether a checkpoint is later than ``global_step``, or unreadable."""
    try:
        return bool(read(path).get("global_step", math.inf) > global_step)
    except InputError:
        return True
