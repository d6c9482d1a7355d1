"""Equal settings give equal weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lsoftmax_lightning.cli import main

from .helpers.command_line import QUIET
from .helpers.formats import write_image


def weights(*args: str) -> dict[str, Tensor]:
    """Return the weights after a run of `fit`."""
    cli = main(["fit", *args, *QUIET, "--model.margin=2", "--trainer.max_epochs=2"])
    assert cli is not None
    return dict(cli.model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_equal_seeds_give_equal_runs() -> None:
    # a network that draws from the generators of Python, NumPy and torch, and augmented images
    args = ["--config=digits.yaml", "--model.backbone={class_path: tests.helpers.interrupted.Random}"]
    args += ["--data=tests.helpers.interrupted.Shifted"]
    first = weights(*args)
    assert same(first, weights(*args))
    assert not same(first, weights(*args, "--seed_everything=1"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_number_of_workers_does_not_change_the_weights(tmp_path: Path) -> None:
    for number in range(48):  # all different
        part = "train" if number < 36 else "test"
        write_image(tmp_path / "images" / part / str(number % 2) / f"{number}.png", (5 * number, 250 * (number % 2), 9))
    runs = [
        weights(
            "--config=folder.yaml",
            f"--data.root={tmp_path / 'images'}",
            "--data.image_size=16",
            "--data.memory_gib=0",
            f"--data.num_workers={workers}",
            "--data.crop_padding=2",
            "--data.flip=true",
            "--data.batch_size=8",
            "--model.backbone=digits",
        )
        for workers in (0, 1, 3)
    ]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])
