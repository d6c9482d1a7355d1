"""Epochs that are counted once, and learning rates that know of each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor

from lsoftmax_lightning.callbacks import ExactResume

from ..conftest import BlobsDataModule, make_model, make_trainer


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
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_from_the_end_of_an_epoch_the_next_one_follows(length: dict[str, Any], tmp_path: Path) -> None:
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


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_plateau_is_told_of_each_epoch_once(tmp_path: Path) -> None:
    def train(folder: str, max_epochs: int = 3, **resume: Any) -> Any:
        saved = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        model = make_model(
            lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, "val/loss", factor=0.5, patience=0),
            lr_scheduler_interval="epoch",
        )
        length = {"max_epochs": max_epochs, "val_check_interval": 5, "check_val_every_n_epoch": None}
        trainer = make_trainer(callbacks=[saved, ExactResume()], enable_checkpointing=True, **length)
        trainer.fit(model, BlobsDataModule(), **resume)  # 8 steps an epoch, validations behind 5, 10, 15, 20
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
