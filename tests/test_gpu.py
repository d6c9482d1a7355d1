"""Tests that need a GPU: ``pytest -m gpu``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.callbacks import Dashboard, LastCheckpoint, MarginMonitor
from lsoftmax_lightning.chunked_loss import chunked_cross_entropy
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.transforms import RandomCropFlip

from .helpers.command_line import QUIET
from .helpers.training import BlobsDataModule

pytestmark = pytest.mark.gpu


class Batches(Callback):
    """Keep the batches of an epoch."""

    def __init__(self) -> None:
        self.kept: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: list[Tensor], batch_idx: int) -> None:
        self.kept.append([part.cpu() for part in batch])


def batches(accelerator: str, device_memory_gib: float) -> list[list[Tensor]]:
    torch.manual_seed(0)
    data, batches = BlobsDataModule(), Batches()
    data.device_memory_gib = device_memory_gib
    data.augment = RandomCropFlip(2, flip=True)
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator=accelerator, devices=1, max_epochs=2, callbacks=[batches], **settings)
    trainer.fit(ClassificationModule(num_classes=4, backbone="digits", image_shape=(1, 8, 8)), data)
    return batches.kept


def test_batches_from_device_and_host_memory_are_equal() -> None:
    """Images and classes are equal to the bit on one device; normalisation may round differently on another."""
    on_device, from_host = batches("gpu", 4.0), batches("gpu", 0.0)
    assert len(on_device) == len(from_host) == 16
    for one, other in zip(on_device, from_host, strict=True):
        assert all(map(torch.equal, one, other))
    for one, other in zip(on_device, batches("cpu", 4.0), strict=True):
        torch.testing.assert_close(one, other)


class NoWait(Callback):
    """Make a wait for the device an error in a few steps, none of which is logged."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 12:
            torch.cuda.set_sync_debug_mode("error")
        elif trainer.global_step == 17:
            torch.cuda.set_sync_debug_mode("default")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["dense", "chunked"])
def test_no_training_step_waits_for_the_device(
    kind: str, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "chunked":
        monkeypatch.setattr("lsoftmax_lightning.heads.CHUNKED_FROM", 2)
    data = BlobsDataModule(batch_size=8)  # 20 steps an epoch
    data.augment = RandomCropFlip(2, flip=True)
    callbacks = [NoWait(), LastCheckpoint(), MarginMonitor(), Dashboard()]
    settings: dict[str, Any] = {"log_every_n_steps": 10, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = Trainer(accelerator="gpu", devices=1, max_epochs=1, precision=precision, callbacks=callbacks, **settings)
    trainer.fit(ClassificationModule(num_classes=4, backbone="digits", image_shape=(1, 8, 8)), data)
    assert trainer.global_step == 20


def test_the_chunked_loss_is_as_exact_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    x, weight, target = torch.randn(64, 16), torch.randn(3000, 16), torch.randint(3000, (64,))

    def loss_and_gradients(device: str) -> list[Tensor]:
        inputs = [tensor.detach().to(device).requires_grad_() for tensor in (x, weight)]
        loss = chunked_cross_entropy(*inputs, target.to(device), margin=4, lambda_=1.0, label_smoothing=0.1).loss
        return [loss.detach().cpu(), *(gradient.cpu() for gradient in torch.autograd.grad(loss, inputs))]

    for found, expected in zip(loss_and_gradients("cuda"), loss_and_gradients("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_class_sharded_strategy_with_synchronised_batch_norm_trains_and_tests(tmp_path: Path) -> None:
    arguments = [*QUIET, "--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.strategy=class_sharded"]
    arguments += ["--trainer.sync_batchnorm=true", "--trainer.max_epochs=3", f"--trainer.logger.save_dir={tmp_path}"]
    main(["fit", "--config=digits.yaml", *arguments])
    (results,) = tmp_path.rglob("results.json")
    assert json.loads(results.read_text())["test/acc"] > 0.8
