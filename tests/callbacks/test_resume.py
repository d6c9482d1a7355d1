"""Epochs that are counted once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
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
