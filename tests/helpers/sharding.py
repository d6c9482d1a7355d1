"""What each of 1, 2 and 4 processes does with a head that is divided by class; on 1 it is in one piece."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.callbacks import Dashboard, ExactResume, MarginMonitor
from lsoftmax_lightning.chunked_loss import ClassShard, chunked_cross_entropy
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.functional import margin_logits
from lsoftmax_lightning.schedules import PowerLaw
from lsoftmax_lightning.strategies import ClassShardedStrategy
from lsoftmax_lightning.transforms import RandomCropFlip

from .processes import Net, OfSize
from .training import BlobsDataModule, make_model, make_trainer

COUNTS = (1, 2, 4)
CLASSES = (2, 3, 5, 8, 37)  # on four processes some have none, or fewer than others
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped and accumulated": {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


def compare_losses() -> float:
    """The largest difference of loss, gradients and predictions to a head in one piece, in float64."""
    if not dist.is_initialized():  # on one process
        dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    differences = []
    for classes in CLASSES:
        for margin in (1, 2, 3, 4):
            for smoothing in (0.0, 0.1):
                torch.manual_seed(classes + margin)
                x, weight = (torch.randn(n, 16, dtype=torch.float64) for n in (80 * count, classes))
                target = torch.randint(classes, (80 * count,))
                x.requires_grad_()
                weight.requires_grad_()
                logits = margin_logits(F.linear(x, weight), x, weight, target, margin, 0.3)
                loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
                loss.backward()
                assert x.grad is not None
                assert weight.grad is not None

                each = -(-classes // count)
                share, own = slice(80 * rank, 80 * (rank + 1)), slice(each * rank, each * (rank + 1))
                part, rows = (of.detach()[at].requires_grad_() for of, at in ((x, share), (weight, own)))
                shard = ClassShard(dist.group.WORLD, each * rank, classes)
                divided = chunked_cross_entropy(part, rows, target[share], margin, 0.3, smoothing, shard)
                divided.loss.backward()
                assert part.grad is not None
                assert rows.grad is not None
                assert torch.equal(divided.prediction, F.linear(x, weight)[share].argmax(1))
                assert torch.equal(divided.correct, (logits.argmax(1) == target)[share])
                pairs = [(divided.loss, loss), (part.grad / count, x.grad[share]), (rows.grad, weight.grad[own])]
                differences += [(a - b).abs().max() for a, b in pairs if b.numel()]
    return float(torch.stack(differences).max().detach())


def train(folder: Path, checkpoint: str | None = None, **settings: Any) -> tuple[Any, ClassificationModule]:
    """For 30 steps, on as many processes as there are, divided if they are several."""
    seed_everything(0)
    data = BlobsDataModule(batch_size=16, val_size=37)  # of whose last batch some processes get nothing
    data.augment = RandomCropFlip(padding=1, flip=True)
    schedule = PowerLaw(base=100, gamma=0.05, power=2)  # of the step alone
    model = make_model(
        backbone=Net(),
        margin=4,
        num_classes=5,
        lambda_schedule=schedule,
        optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=5e-4),
    )
    count = int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(
        strategy=ClassShardedStrategy() if count > 1 else "auto",
        devices=count,
        max_epochs=-1,
        max_steps=30,
        enable_checkpointing=True,
        callbacks=[
            *(MarginMonitor(), Dashboard(), ExactResume()),
            ModelCheckpoint(folder, f"{count} after {{step}}", every_n_train_steps=12, save_top_k=-1),
        ],
        **settings,
    )
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 30
    assert isinstance(model.head.weight, DTensor) == (count > 1)
    return trainer, model


def whole(model: ClassificationModule) -> dict[str, Tensor]:
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in model.state_dict().items()}


def work(folder: Path, names: list[str]) -> None:
    """Train, test and save the named runs."""
    count = os.environ["WORLD_SIZE"]
    for name in names:
        trainer, model = train(folder / name, **RUNS[name])
        figures = dict(trainer.callback_metrics)
        if name == "plain":
            figures |= trainer.test(model, BlobsDataModule(), verbose=False)[0]
        with torch.inference_mode():  # as Lightning evaluates, but over gloo
            wanted = torch.tensor([4, 0])
            assert torch.equal(model.head.class_weights(wanted), model.head.full_weight[wanted])
        content = {"weights": whole(model), "figures": {key: float(value) for key, value in figures.items()}}
        if os.environ["RANK"] == "0":
            torch.save(content, folder / f"{name} {count}.pt")
    difference = compare_losses()
    if os.environ["RANK"] == "0":
        torch.save(difference, folder / f"difference {count}.pt")


class Normed(ClassificationModule):
    """With a child that has buffers, and no parameters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(5, Net(), image_shape=(1, 8, 8), **settings)
        self.norm = nn.BatchNorm2d(1, affine=False)

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(self.norm(x))


class Blocks(Normed):
    """Shards itself, each layer on its own."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        self.head.shard(mesh)
        for layer in self.backbone:  # type: ignore[union-attr]
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh, reshard_after_forward=False)


def evaluate(folder: Path) -> None:
    """Evaluates the network of the first process on all, of which some have fewer batches."""
    for kind in (Normed, Blocks):
        torch.manual_seed(0)
        model, data = kind(), OfSize(9)
        assert model.norm.running_mean is not None
        model.norm.running_mean.fill_(int(os.environ["RANK"]))
        make_trainer(strategy=ClassShardedStrategy(), devices=2).test(model, data, verbose=False)
        assert model.norm.running_mean == 0


def refusals(folder: Path) -> None:
    """What is refused before any work, and how."""
    messages, version = {}, torch.__version__
    for name in ("criterion", "parameter", "torch", "logits"):
        model = make_model(backbone=Net())
        if name == "criterion":
            model.criterion = nn.MultiMarginLoss()
        elif name == "parameter":
            model.scale = nn.Parameter(torch.ones(()))
        elif name == "torch":
            torch.__version__ = TorchVersion("2.8.0")
        else:
            torch.__version__ = version
            model.margin_loss = partial(lambda head, x, target: (head(x, target), target), model.head)  # type: ignore[method-assign]
        try:
            make_trainer(strategy=ClassShardedStrategy(), devices=2).fit(model, BlobsDataModule())
        except InputError as error:
            messages[name] = str(error)
    if os.environ["RANK"] == "0":
        torch.save(messages, folder / "refusals.pt")


def go_on(folder: Path, counts: list[int]) -> None:
    """Resume from the checkpoints of these numbers of processes."""
    for before in counts:
        _, model = train(folder / "again", str(folder / f"plain/{before} after step=12.ckpt"))
        weights = whole(model)
        if os.environ["RANK"] == "0":
            torch.save(weights, folder / f"{before} to {os.environ['WORLD_SIZE']}.pt")
