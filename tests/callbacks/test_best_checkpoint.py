"""Best checkpoint of a run that was killed, moved or continued in another folder, and hostile checkpoints."""

import functools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lsoftmax_lightning.callbacks import BestCheckpoint, ExactResume, LastCheckpoint
from lsoftmax_lightning.checkpoints import indexed, read

from ..helpers.training import BlobsDataModule, make_model, make_trainer

# the loss falls: each epoch has a new best checkpoint
FALLING: dict[str, Any] = {"mode": "min", "max_epochs": 4}
KEEPS = [{"filename": "best"}, {"filename": "{epoch}"}, {"filename": "{epoch}", "save_top_k": 2}]


class Killed(BaseException):
    """Stand-in for SIGKILL."""


def train(folder: Path, keep: dict[str, Any], max_epochs: int = 5, mode: str = "max", **fit: Any) -> BestCheckpoint:
    """Train in a folder; with ``max``, the worst validation counts as the best, so that it is an early one."""
    best = BestCheckpoint(folder, monitor="val/loss", mode=mode, **keep)
    callbacks = [best, LastCheckpoint(folder), ExactResume()]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=max_epochs, limit_train_batches=2)
    model = make_model(optimizer=partial(torch.optim.SGD, lr=0.01))  # small, so that the loss falls from the first step
    trainer.fit(model, BlobsDataModule(), **fit)
    return best


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BestCheckpoint]:
    """Return the callback of an uninterrupted run, trained once for each of its settings."""

    @functools.cache
    def whole(mode: str, max_epochs: int, **keep: Any) -> BestCheckpoint:
        return train(tmp_path_factory.mktemp("whole"), keep, max_epochs, mode)

    return whole


def assert_same_best(one: BestCheckpoint, other: BestCheckpoint) -> None:
    paths = [Path(best.best_model_path) for best in (one, other)]
    assert paths[0].name == paths[1].name
    assert one.best_model_score == other.best_model_score
    assert {Path(path).name for path in one.best_k_models} == {Path(path).name for path in other.best_k_models}
    for path, best in zip(paths, (one, other), strict=True):
        assert path.parent == Path(str(best.dirpath))
        assert indexed(path.parent, "best") == path
        assert indexed(path.parent, "last").name == "last.ckpt"
    states = [read(path)["state_dict"] for path in paths]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("epochs", [1, 3, 5])
@pytest.mark.parametrize("continued", ["moved", "elsewhere"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_best_checkpoint_is_kept_in_a_moved_or_new_folder(
    continued: str, epochs: int, keep: dict[str, Any], whole_run: Callable[..., BestCheckpoint], tmp_path: Path
) -> None:
    train(tmp_path / "begun", keep, epochs)
    if continued == "moved":
        (tmp_path / "begun").rename(tmp_path / "moved")
        again = train(tmp_path / "moved", keep, ckpt_path=tmp_path / "moved" / "last.ckpt")
    else:
        again = train(tmp_path / "elsewhere", keep, ckpt_path=tmp_path / "begun" / "last.ckpt")
    assert_same_best(again, whole_run("max", 5, **keep))


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("before", [(LastCheckpoint, "_save_checkpoint"), (BestCheckpoint, "_remove_checkpoint")])
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The best checkpoint in")
def test_kill_between_best_and_last_checkpoint_keeps_the_best(
    before: tuple[type[ModelCheckpoint], str],
    epoch: int,
    keep: dict[str, Any],
    whole_run: Callable[..., BestCheckpoint],
    tmp_path: Path,
) -> None:
    def kill(callback: ModelCheckpoint, trainer: Trainer, path: str) -> None:
        if trainer.current_epoch == epoch:
            raise Killed
        original(callback, trainer, path)

    whole = whole_run(**FALLING, **keep)
    original = getattr(*before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*before, kill)
        try:
            train(tmp_path / "killed", keep, **FALLING)
        except Killed:
            pass
        else:
            assert before[1] == "_remove_checkpoint"  # the same name or fewer files: nothing to remove
            return
    best = json.loads((tmp_path / "killed" / "index.json").read_text())["best"]
    assert (tmp_path / "killed" / best).is_file()
    again = train(tmp_path / "killed", keep, **FALLING, ckpt_path=tmp_path / "killed" / "last.ckpt")
    assert_same_best(again, whole)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_two_best_checkpoints_in_a_folder_keep_both_files(tmp_path: Path) -> None:
    first, second = (BestCheckpoint(tmp_path, "best", monitor="val/loss", mode=mode) for mode in ("min", "max"))
    trainer = make_trainer(callbacks=[first, second], enable_checkpointing=True, max_epochs=3, limit_train_batches=2)
    trainer.fit(make_model(optimizer=partial(torch.optim.SGD, lr=0.01)), BlobsDataModule())
    epochs = [read(best.best_model_path)["epoch"] for best in (first, second)]
    assert epochs == [2, 0]  # the loss falls
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "best-v1.ckpt", "index.json"}
    assert indexed(tmp_path, "best") == Path(second.best_model_path)


def test_best_checkpoint_keeps_the_file_of_a_callback_without_a_monitor(tmp_path: Path) -> None:
    latest = ModelCheckpoint(tmp_path, "best", save_last=False)
    best = BestCheckpoint(tmp_path, "best", monitor="val/loss")
    never = BestCheckpoint(tmp_path, "never", monitor="val/acc", every_n_epochs=9)
    callbacks = [latest, best, never]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=2, limit_train_batches=2)
    trainer.fit(make_model(optimizer=partial(torch.optim.SGD, lr=0.01)), BlobsDataModule())
    assert len({latest.best_model_path, best.best_model_path}) == 2
    assert all(Path(callback.best_model_path).is_file() for callback in (latest, best))
    assert indexed(tmp_path, "best") == Path(best.best_model_path)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_remote_folder_may_end_in_a_slash(slash: str) -> None:
    best = BestCheckpoint(f"memory://bucket/checkpoints{slash}", "{val/loss:.2f}", monitor="val/loss")
    name = best.format_checkpoint_name({"val/loss": torch.tensor(0.5)})
    assert name == "memory://bucket/checkpoints/val_loss=0.50.ckpt"


def test_resume_from_an_earlier_checkpoint_drops_later_ones(tmp_path: Path) -> None:
    keep = {"filename": "{epoch}", "save_top_k": 2}
    best = train(tmp_path, keep, **FALLING)
    assert {Path(path).name for path in best.best_k_models} == {"epoch=2.ckpt", "epoch=3.ckpt"}
    with pytest.warns(UserWarning, match=r"is chosen without epoch=1.ckpt: missing, or later"):
        again = train(tmp_path / "back", keep, **FALLING, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert_same_best(again, best)


@pytest.mark.parametrize("kind", [BestCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize("path", ["{victim}", "{own}/../victim", "{own}/../victim/file.ckpt", "victim"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_hostile_checkpoint_cannot_delete_other_files(kind: type[ModelCheckpoint], path: str, tmp_path: Path) -> None:
    victim, own = tmp_path / "victim", tmp_path / "own"
    victim.mkdir()
    (victim / "file.ckpt").write_text("")

    def fit(max_epochs: int, **fit: Any) -> None:
        keep = kind(own, "best-{epoch}", "val/loss")
        trainer = make_trainer(callbacks=[keep, ExactResume()], enable_checkpointing=True, max_epochs=max_epochs)
        trainer.fit(make_model(), BlobsDataModule(), **fit)

    fit(1)
    hostile = torch.load(own / "best-epoch=0.ckpt", weights_only=True)
    (state,) = (state for key, state in hostile["callbacks"].items() if key.startswith("ModelCheckpoint"))
    named = path.format(victim=victim, own=own)
    state |= dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), named)
    state |= {"best_k_models": {named: torch.tensor(99.0)}, "kth_value": torch.tensor(99.0)}
    torch.save(hostile, tmp_path / "hostile.ckpt")
    with pytest.warns(UserWarning, match="is chosen without"):
        fit(3, ckpt_path=tmp_path / "hostile.ckpt")
    assert (victim / "file.ckpt").is_file()


@pytest.mark.parametrize("weights_only", [False, True])
def test_best_checkpoint_and_score_are_restored_from_files(weights_only: bool, tmp_path: Path) -> None:
    best = train(tmp_path / "checkpoints", {"filename": "best", "save_weights_only": weights_only}, 3)
    restored = BestCheckpoint(monitor="val/loss", mode="max", save_weights_only=weights_only)
    restored.restore_best(make_trainer(default_root_dir=tmp_path))
    assert Path(restored.best_model_path) == Path(best.best_model_path)
    assert best.best_model_score is not None
    assert restored.best_model_score == best.best_model_score
