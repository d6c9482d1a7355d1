"""Small data, models and Trainers for tests."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer

from lsoftmax_lightning import ClassificationModule, LSoftmaxModule
from lsoftmax_lightning.datamodules import ImageDataModule
from lsoftmax_lightning.datamodules.base import Images

# with torch 2.6, no release of onnxscript exports batch normalisation and pooling
WRITES_ONNX = torch.__version__ >= "2.7"
# earlier releases sum gradients over gloo, which ClassShardedStrategy refuses
SHARDS_ON_CPUS = torch.__version__ >= "2.9"


class BlobsDataModule(ImageDataModule):
    """Four classes of noisy 8x8 images with a bright quarter; 200 to train and 50 to test."""

    class_names = ("nw", "ne", "sw", "se")
    image_shape = (1, 8, 8)
    mean = (0.5,)
    std = (0.25,)

    def __init__(self, batch_size: int = 20, val_size: float = 0.2, split_seed: int = 0) -> None:
        super().__init__(batch_size, val_size, split_seed)

    def load(self, train: bool) -> Images:
        generator = torch.Generator().manual_seed(int(train))
        targets = torch.arange(200 if train else 50) % 4
        images = torch.randint(120, (len(targets), 1, 8, 8), generator=generator, dtype=torch.uint8)
        for image, target in zip(images, targets.tolist(), strict=True):
            row, column = divmod(target, 2)
            image[0, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 120
        return Images(images, targets)


def make_model(**settings: Any) -> ClassificationModule:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"num_classes": 4, "backbone": "digits", "margin": 2, "image_shape": (1, 8, 8)}
    return ClassificationModule(**defaults | settings)


def num_hooks(model: LSoftmaxModule) -> int:
    """Count the hooks that observe the calls of the head; torch has no public name for them."""
    return len(model.head.observed._forward_hooks)


def make_trainer(**settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(**defaults | settings)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
