"""Task of each of 1, 2 and 4 processes with a head that is sharded by class; on 1 it is not sharded."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

from lsoftmax_lightning import ClassificationModule, LSoftmaxLinear
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
CLASSES = (2, 3, 5, 8, 37)  # on four processes, some have no class or fewer than others
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped and accumulated": {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


def compare_losses() -> float:
    """Return the largest difference of loss and gradients to an unsharded head, in float64; check predictions."""
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
                rows, classes_of_rank = slice(80 * rank, 80 * (rank + 1)), slice(each * rank, each * (rank + 1))
                local_x = x.detach()[rows].requires_grad_()
                local_weight = weight.detach()[classes_of_rank].requires_grad_()
                shard = ClassShard(dist.group.WORLD, each * rank, classes)
                sharded = chunked_cross_entropy(local_x, local_weight, target[rows], margin, 0.3, smoothing, shard)
                sharded.loss.backward()
                assert local_x.grad is not None
                assert local_weight.grad is not None
                assert torch.equal(sharded.prediction, F.linear(x, weight)[rows].argmax(1))
                assert torch.equal(sharded.correct, (logits.argmax(1) == target)[rows])
                pairs = [
                    (sharded.loss, loss),
                    (local_x.grad / count, x.grad[rows]),
                    (local_weight.grad, weight.grad[classes_of_rank]),
                ]
                differences += [(a - b).abs().max() for a, b in pairs if b.numel()]
    return float(torch.stack(differences).max().detach())


def train(folder: Path, checkpoint: str | None = None, **settings: Any) -> tuple[Any, ClassificationModule]:
    """Train for 30 steps on all processes, with a sharded head if there are several."""
    seed_everything(0)
    data = BlobsDataModule(batch_size=16, val_size=37)  # in the last batch, some processes have no sample
    data.augment = RandomCropFlip(padding=1, flip=True)
    schedule = PowerLaw(base=100, gamma=0.05, power=2)  # depends only on the step
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
        metrics = dict(trainer.callback_metrics)
        if name == "plain":
            metrics |= trainer.test(model, BlobsDataModule(), verbose=False)[0]
        with torch.inference_mode():  # as Lightning evaluates, but over gloo
            wanted = torch.tensor([4, 0])
            assert torch.equal(model.head.class_weights(wanted), model.head.full_weight[wanted])
        content = {"weights": whole(model), "metrics": {key: float(value) for key, value in metrics.items()}}
        if os.environ["RANK"] == "0":
            torch.save(content, folder / f"{name} {count}.pt")
    difference = compare_losses()
    if os.environ["RANK"] == "0":
        torch.save(difference, folder / f"difference {count}.pt")


class Normed(ClassificationModule):
    """Module with a child that has buffers but no parameters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(5, Net(), image_shape=(1, 8, 8), **settings)
        self.norm = nn.BatchNorm2d(1, affine=False)

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(self.norm(x))


class Blocks(Normed):
    """Module that shards each layer separately."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        self.head.shard(mesh)
        for layer in self.backbone:  # type: ignore[union-attr]
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh, reshard_after_forward=False)


def evaluate(folder: Path) -> None:
    """Test the network of the first process on all; some processes have fewer batches."""
    for kind in (Normed, Blocks):
        torch.manual_seed(0)
        model, data = kind(), OfSize(9)
        assert model.norm.running_mean is not None
        model.norm.running_mean.fill_(int(os.environ["RANK"]))
        make_trainer(strategy=ClassShardedStrategy(), devices=2).test(model, data, verbose=False)
        assert model.norm.running_mean == 0


class Several(ClassificationModule):
    """Module with layers in a container, a second head, and a buffer that each process draws differently."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__(4, Net(), margin=2, lambda_schedule=PowerLaw(base=10, gamma=0.1, power=1))
        self.layers = nn.ModuleList([nn.Linear(16, 16)])
        self.second = LSoftmaxLinear(16, 3, margin=2, lambda_=1.0)
        self.both = nn.Sequential(self.backbone, self.head)
        generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
        self.register_buffer("order", torch.randperm(16, generator=generator))

    def forward_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers[0](super().forward_features(x)[:, self.order])
        return features

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        features, target = self.forward_features(batch[0]), batch[1]
        loss = self.head.cross_entropy(features, target).loss + self.second.cross_entropy(features, target % 3).loss
        with torch.no_grad():
            self.head(features)  # keeps the weight before the step
        return loss

    def on_validation_epoch_start(self) -> None:
        weight = self.head.weight
        assert torch.equal(self.head.full_weight, weight.full_tensor() if isinstance(weight, DTensor) else weight)


class FullyShardedHead(ClassificationModule):
    """Module that shards its head like any other layer."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for part in (self.backbone, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"], reshard_after_forward=False)


def train_unusual(folder: Path) -> None:
    """Train modules that are sharded in other ways, with validations before and between the steps."""
    count = int(os.environ["WORLD_SIZE"])
    by_two: Any = ModelParallelStrategy(data_parallel_size=count, tensor_parallel_size=1)
    for name, kind, strategy in (
        ("several", Several, ClassShardedStrategy()),
        ("fully sharded", partial(FullyShardedHead, 4, Net(), margin=2), by_two),
    ):
        seed_everything(0)
        model = kind()
        trainer = make_trainer(
            strategy=strategy if count > 1 else "auto", devices=count, max_steps=8, val_check_interval=3
        )
        trainer.fit(model, BlobsDataModule(batch_size=16))
        weights = whole(model)
        if os.environ["RANK"] == "0":
            torch.save(weights, folder / f"{name} {count}.pt")
        with torch.no_grad():
            assert model.head.full_weight.any()
            model.head.load_state_dict({"weight": 0 * model.head.weight})
            assert not model.head.full_weight.any()


def rejections(folder: Path) -> None:
    """Save the error messages of unsupported settings."""
    messages, version = {}, torch.__version__
    for name in ("averaging", "shared", "container", "unsharded", "meta", "criterion", "parameter", "torch", "logits"):
        model, callbacks = make_model(backbone=Net()), []
        if name == "averaging":
            callbacks = [StochasticWeightAveraging(0.1)]
        elif name == "shared":
            model.both = nn.Sequential(model.backbone[1], nn.Linear(1, 1))  # type: ignore[index]
        elif name == "container":
            model.scales = nn.ParameterList([nn.Parameter(torch.ones(()))])
        elif name == "unsharded":
            model.configure_model = lambda: None  # type: ignore[method-assign]
        elif name == "meta":
            model.head.to("meta")
        elif name == "criterion":
            model.criterion = nn.MultiMarginLoss()
        elif name == "parameter":
            model.scale = nn.Parameter(torch.ones(()))
        elif name == "torch":
            torch.__version__ = TorchVersion("2.8.0")
        else:
            torch.__version__ = version
            model.margin_loss = partial(lambda head, x, target: (head(x, target), target), model.head)  # type: ignore[method-assign]
        try:
            trainer = make_trainer(strategy=ClassShardedStrategy(), devices=2, callbacks=callbacks)
            trainer.fit(model, BlobsDataModule())
        except InputError as error:
            messages[name] = str(error)
    if os.environ["RANK"] == "0":
        torch.save(messages, folder / "rejections.pt")


def resume(folder: Path, counts: list[int]) -> None:
    """Resume from the checkpoints of runs on other numbers of processes."""
    for before in counts:
        _, model = train(folder / "again", str(folder / f"plain/{before} after step=12.ckpt"))
        weights = whole(model)
        if os.environ["RANK"] == "0":
            torch.save(weights, folder / f"{before} to {os.environ['WORLD_SIZE']}.pt")
