"""Arguments of short runs, and output of failing commands."""

from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from lsoftmax_lightning.cli import main

from .formats import write_cifar, write_folder, write_lfw, write_mnist

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--dashboard.every_n_epochs=0",
]
# classes move apart, so they are nearest in the first epoch
FIRST_IS_BEST = ["--checkpoint.monitor=val/centre_angle_nearest", "--checkpoint.mode=min"]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--model.margin=2"]


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the output of a failing command, which must be short and without a traceback."""
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code not in (0, None)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert len(printed.splitlines()) < 30
    return printed


def small_data(config: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write small data for a config in their original format, and return the arguments that use them."""
    if config.startswith("mnist"):
        write_mnist(root)
    elif config == "fashion_mnist.yaml":
        write_mnist(root, folder="FashionMNIST")
    elif config.startswith("cifar"):
        write_cifar(root, monkeypatch, CIFAR100 if config == "cifar100.yaml" else CIFAR10)
    elif config == "folder.yaml":
        write_folder(root)
    elif config.startswith("lfw"):
        write_lfw(root, folds=10)
    else:
        return []
    arguments = [f"--data.root={root}", "--data.batch_size=16"]
    if config == "lfw.yaml":
        write_folder(root / "faces", ("train",))
        arguments += [f"--data.train_root={root / 'faces' / 'train'}", "--model.pca_components=4"]
    if config in ("fashion_mnist.yaml", "mnist_1000.yaml"):
        arguments += ["--data.train_size=100"]
    return arguments
