"""Exact resume within and between epochs: weights, epochs and learning rates."""

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor
from torch.optim import SGD
from torch.optim.swa_utils import SWALR

from lsoftmax_lightning.callbacks import ExactResume, LastCheckpoint
from lsoftmax_lightning.checkpoints import read

from ..helpers.training import BlobsDataModule, make_model, make_trainer


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": 24, "max_epochs": -1},
        {"max_steps": 24, "max_epochs": 3},
        {"max_epochs": 3},
        {"max_steps": 24, "max_epochs": -1, "val_check_interval": 0.5},
        {"max_steps": 24, "max_epochs": -1, "val_check_interval": 4, "check_val_every_n_epoch": None},
    ],
)
def test_resume_at_the_end_of_an_epoch_starts_the_next_one(length: dict[str, Any], tmp_path: Path) -> None:
    def train(folder: str, **resume: Any) -> Tensor:
        validated = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1)
        model = make_model()
        trainer = make_trainer(callbacks=[validated, ExactResume()], enable_checkpointing=True, **length)
        trainer.fit(model, BlobsDataModule(), **resume)  # 8 steps an epoch
        assert trainer.global_step == 24
        return model.head.weight

    whole = train("whole")
    for step in (8, 16, 24):
        assert torch.equal(train(f"from_{step}", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt"), whole)


def test_plateau_scheduler_steps_once_per_epoch(tmp_path: Path) -> None:
    def train(folder: str, max_epochs: int = 3, **resume: Any) -> Any:
        saved = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        model = make_model(
            lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, "val/loss", factor=0.5, patience=0),
            lr_scheduler_interval="epoch",
        )
        length = {"max_epochs": max_epochs, "val_check_interval": 5, "check_val_every_n_epoch": None}
        trainer = make_trainer(callbacks=[saved, ExactResume()], enable_checkpointing=True, **length)
        trainer.fit(model, BlobsDataModule(), **resume)  # 8 steps an epoch, validations after 5, 10, 15, 20
        trainer.save_checkpoint(tmp_path / folder / "ended.ckpt")
        return model.head.weight, trainer.lr_scheduler_configs[0].scheduler.state_dict()

    weight, plateau = train("whole")
    train("stopped", ckpt_path=tmp_path / "whole" / "step=6.ckpt")
    again, plateau_again = train("again", ckpt_path=tmp_path / "stopped" / "step=7.ckpt")
    assert plateau_again == plateau
    assert torch.equal(again, weight)
    train("shorter", max_epochs=1)
    _, plateau_again = train("longer", ckpt_path=tmp_path / "shorter" / "ended.ckpt")
    assert plateau_again["last_epoch"] == plateau["last_epoch"]


class StopAt(Callback):
    """End the run after a batch, as ``max_time`` does."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            trainer.should_stop = True


class Signal(Callback):
    """Send SIGTERM to the process in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train_in(
    folder: Path, *callbacks: Callback, settings: dict[str, Any] | None = None, **length: Any
) -> tuple[Trainer, dict[str, Tensor]]:
    """Train in a folder, from its last checkpoint if there is one; 8 batches an epoch."""
    length = {"max_epochs": 3} | length
    model = make_model(**settings or {})
    trainer = make_trainer(
        callbacks=[*callbacks, LastCheckpoint(folder), ExactResume()], enable_checkpointing=True, **length
    )
    last = folder / "last.ckpt"
    trainer.fit(model, BlobsDataModule(), ckpt_path=last if last.is_file() else None)
    return trainer, model.state_dict()


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Tensor]]:
    """Return the weights after an uninterrupted run, trained once for each setting."""

    def weights(**length: Any) -> dict[str, Tensor]:
        return train_in(tmp_path_factory.mktemp("whole"), **length)[1]

    return functools.cache(weights)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_signal_ends_a_run_with_epochs_of_one_step(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train_in(tmp_path, Signal(2), max_epochs=12, limit_train_batches=1, limit_val_batches=0)
    assert read(tmp_path / "last.ckpt")["global_step"] == 3


VALIDATIONS = [
    {},
    {"check_val_every_n_epoch": 2},
    {"limit_val_batches": 0},
    {"val_check_interval": 3},
    {"val_check_interval": 5, "check_val_every_n_epoch": None},
]


@pytest.mark.parametrize("validation", VALIDATIONS, ids=str)
# 8 steps an epoch; max_time ends a run by `should_stop`
@pytest.mark.parametrize("step", [3, 8, 11, 15])
@pytest.mark.parametrize("limit", ["max_steps", "should_stop"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_raised_limit_continues_within_the_epoch(
    limit: str,
    step: int,
    validation: dict[str, Any],
    whole_run: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    if limit == "max_steps":
        train_in(tmp_path / "part", max_steps=step, **validation)
    else:
        train_in(tmp_path / "part", StopAt(step), **validation)
    assert torch.load(tmp_path / "part" / "last.ckpt", weights_only=True)["global_step"] == step
    trainer, resumed = train_in(tmp_path / "part", **validation)
    assert trainer.global_step == 24
    assert_equal(resumed, whole_run(**validation))


@pytest.mark.parametrize("validation", [*VALIDATIONS, {"max_steps": 21}, {"max_epochs": 1}], ids=str)
def test_last_checkpoint_has_the_last_step(validation: dict[str, Any], tmp_path: Path) -> None:
    trainer, weights = train_in(tmp_path, **validation)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == trainer.global_step
    assert_equal(last["state_dict"], weights)
    assert json.loads((tmp_path / "index.json").read_text()) == {"last": "last.ckpt"}


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`")
def test_run_ended_by_early_stopping_stays_ended(tmp_path: Path) -> None:
    def stopping() -> EarlyStopping:
        return EarlyStopping("val/loss", mode="max", patience=1)

    _, ended = train_in(tmp_path, stopping(), max_epochs=9)
    before = (tmp_path / "last.ckpt").read_bytes()
    trainer, again = train_in(tmp_path, stopping(), max_epochs=9)
    assert trainer.global_step == torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] < 72
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert_equal(again, ended)
    trainer, _ = train_in(tmp_path, max_epochs=9)  # without the callback
    assert trainer.global_step == 72


@pytest.mark.parametrize(
    "callback",
    [
        pytest.param(lambda: GradientAccumulationScheduler({0: 1, 1: 2, 3: 4}), id="accumulation"),
        pytest.param(
            lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=2),
            id="averaging",
            marks=pytest.mark.skipif(
                "anneal_func" in SWALR(SGD([torch.zeros(1)]), 0.1).state_dict(),
                reason="torch saves a function with this scheduler, which it refuses to load",
            ),
        ),
    ],
)
@pytest.mark.parametrize("step", [2, 9, 14])
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Swapping scheduler", "ignore:.*lr_scheduler.step")
def test_epoch_callbacks_resume_within_an_epoch(callback: Callable[[], Callback], step: int, tmp_path: Path) -> None:
    _, whole = train_in(tmp_path / "whole", callback(), max_epochs=5)
    with pytest.raises(SystemExit):
        train_in(tmp_path / "part", callback(), Signal(step), max_epochs=5)
    _, resumed = train_in(tmp_path / "part", callback(), max_epochs=5)
    assert_equal(resumed, whole)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`")
def test_double_precision_run_resumes_exactly(tmp_path: Path) -> None:
    _, whole = train_in(tmp_path / "whole", precision="64-true")
    train_in(tmp_path / "part", precision="64-true", max_steps=11)
    _, resumed = train_in(tmp_path / "part", precision="64-true")
    assert resumed["head.weight"].dtype == torch.float64
    assert_equal(resumed, whole)
    model = make_model()
    make_trainer(precision="64-true", callbacks=[ExactResume()]).test(
        model, BlobsDataModule(), ckpt_path=tmp_path / "whole" / "last.ckpt", verbose=False
    )
    assert_equal(model.state_dict(), whole)
