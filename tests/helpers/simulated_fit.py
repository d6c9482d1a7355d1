"""Train on a simulated accelerator, and print the waits in steps that are not logged, as JSON."""

import json
import tempfile
import warnings
from collections import Counter
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lsoftmax_lightning import ClassificationModule, chunked_loss, heads
from lsoftmax_lightning.callbacks import BestCheckpoint, Dashboard, ExactResume, LastCheckpoint, MarginMonitor
from lsoftmax_lightning.checkpoints import AtomicCheckpointIO
from lsoftmax_lightning.chunked_loss import chunked_cross_entropy
from lsoftmax_lightning.dashboard import dashboard
from lsoftmax_lightning.transforms import RandomCropFlip

from .simulated import KERNELS, SIM, WAITS, Mode, SimulatedAccelerator
from .training import BlobsDataModule

EVERY = 4


class Wait(Callback):
    """Wait for the device in each step, as a progress bar does."""

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        loss.item()


class Watch(Callback):
    """Record the waits of steps that are neither logged nor the first of an epoch."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.steps = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # the end of a step, after which Lightning logs, belongs to the next step
        if batch_idx > 1 and trainer.global_step % EVERY not in (0, 1):
            self.waits += WAITS
            self.steps += 1
        WAITS.clear()


def fit(kind: str, precision: Any, *callbacks: Callback) -> dict[str, Any]:
    """Return the number of watched steps, and the waits in them."""
    heads.CHUNKED_FROM = 2 if kind == "chunked" else 4000
    data, watch = BlobsDataModule(batch_size=8), Watch()
    data.augment = RandomCropFlip(2, flip=True)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if precision != "32-true":
        plugins.append(MixedPrecision(precision, "sim"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            strategy=SingleDeviceStrategy(device=SIM, accelerator=SimulatedAccelerator()),  # type: ignore[arg-type]
            devices=1,
            max_epochs=1,
            log_every_n_steps=EVERY,
            logger=TensorBoardLogger(folder, name="", default_hp_metric=False),
            callbacks=[
                LastCheckpoint(),
                BestCheckpoint(monitor="val/acc", mode="max", filename="best"),
                MarginMonitor(),
                ExactResume(),
                Dashboard(),
                *callbacks,
                watch,
            ],
            plugins=plugins,
            enable_model_summary=False,
            inference_mode=False,
        )
        trainer.fit(ClassificationModule(num_classes=4, backbone="digits", image_shape=(1, 8, 8)), data)
    return {"steps": watch.steps, "waits": dict(watch.waits)}


def kernels(samples: int, length: int) -> int:
    """Return the number of kernels of the chunked loss, forward and backward, with chunks of a given length."""
    chunked_loss.CHUNK_LOGITS_ACCELERATOR = 0
    width = 2 * length
    x = torch.randn(samples, width).to(SIM).requires_grad_()
    weight = torch.randn(50, width).to(SIM).requires_grad_()
    target = torch.randint(50, (samples,)).to(SIM)
    KERNELS.clear()
    chunked_cross_entropy(x, weight, target, margin=4, lambda_=1.0).loss.backward()
    return sum(KERNELS.values())


def main() -> None:
    """Run all kinds, and print the results."""
    warnings.filterwarnings("ignore")
    torch._C._set_only_lift_cpu_tensors(True)
    dashboard.draw = lambda snapshot: ()  # plots are drawn after the steps, and not tested here
    with Mode():
        runs = {f"{k} {p}": fit(k, p) for k in ("dense", "chunked") for p in ("32-true", "bf16-mixed")}
        planted = fit("dense", "32-true", Wait())
        counts = [kernels(64 * chunks, 64) for chunks in (1, 2, 3)]
    print("\n" + json.dumps({"runs": runs, "planted": planted, "kernels": counts}))


if __name__ == "__main__":
    main()
