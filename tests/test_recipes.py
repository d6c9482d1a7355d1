"""Recipes of CONTRIBUTING.md, applied to a copy of the package."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lsoftmax_lightning

from .helpers.command_line import SHORT
from .helpers.formats import write_mnist

RECIPES = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


@pytest.mark.slow
def test_recipes_extend_the_package() -> None:
    shutil.copytree(Path(lsoftmax_lightning.__file__).parent, "copy/lsoftmax_lightning")
    shutil.copytree(Path(__file__).parents[1] / "configs", "copy/configs")
    patches = "".join(re.findall(r"^```diff\n(.*?)^```", RECIPES, flags=re.DOTALL | re.MULTILINE))
    subprocess.run(["git", "apply"], input=patches, text=True, cwd="copy", check=True)

    def run(*args: str) -> str:
        environment = os.environ | {"PYTHONPATH": "copy"}
        done = subprocess.run(
            [sys.executable, "-m", "lsoftmax_lightning", *args],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    write_mnist(Path("data"), folder="KMNIST")
    settings = ["--data=KMNISTDataModule", "--model.backbone=tiny", "--data.batch_size=32", "--dashboard.save=true"]
    run(
        "fit", "--config=mnist.yaml", *SHORT, *settings, "--dashboard.every_n_epochs=1", "--trainer.log_every_n_steps=1"
    )
    folder = Path("runs/mnist/m2-s0")
    assert "tiny" in (folder / "config.yaml").read_text()
    events = EventAccumulator(str(folder)).Reload()
    assert "train/angle_max" in events.Tags()["scalars"]
    assert "test/feature_norms" in events.Tags()["images"]
    with (folder / "dashboard/test_feature_norms.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 100
    assert run("backbones").split()[:2] == ["tiny", "digits"]
