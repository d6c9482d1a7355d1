"""Training and test on several processes equal those on one."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lsoftmax_lightning.__main__
from lsoftmax_lightning.cli import main

from .helpers.forked import launch, run_on, srun, torchrun
from .helpers.formats import write_lfw
from .helpers.processes import work
from .helpers.training import SHARDS_ON_CPUS

# without batch normalisation, whose statistics would depend on the number of processes
MODULE = """
import atexit
import os
from pathlib import Path
from typing import Any
from lightning import Callback
from torch import distributed, nn
from lsoftmax_lightning import ClassificationModule, VerificationModule

class Flat(nn.Sequential):
    num_features = 32

class Module(ClassificationModule):
    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, backbone=Flat(nn.Flatten(), nn.Linear(64, 32), nn.Tanh()), **kwargs)

class Faces(VerificationModule):
    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, backbone=Flat(nn.Flatten(), nn.Linear(192, 32), nn.Tanh()), **kwargs)

class Dies(Callback):
    def __init__(self, rank: int, killed: bool) -> None:
        self.rank, self.killed = rank, killed

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 5:
            if self.killed:
                os.kill(os.getpid(), 9)
            raise RuntimeError("this rank fails")

class WritesExit(Callback):
    def __init__(self) -> None:
        self.pickled = True

    def __setstate__(self, state: dict[str, Any]) -> None:  # in a spawned rank, before its process group
        atexit.register(lambda: Path(f"exit_{os.getpid()}").write_text(str(distributed.is_initialized())))
"""


def arguments(devices: int, *args: str, config: str = "digits.yaml", module: str = "Module") -> list[str]:
    Path("of_processes.py").write_text(MODULE)
    return [
        "fit",
        "--config",
        config,
        "--model",
        f"of_processes.{module}",
        "--trainer.accelerator=cpu",
        "--trainer.strategy=ddp",
        f"--trainer.devices={devices}",
        "--trainer.max_epochs=3",
        f"--trainer.logger.version=on{devices}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        *args,
    ]


def run(devices: int, *args: str, **names: str) -> subprocess.CompletedProcess[str]:
    """Run fit on ranks started as by torchrun."""
    return run_on(devices, partial(main, arguments(devices, *args, **names)))


def run_launched(devices: int, *args: str) -> subprocess.CompletedProcess[str]:
    """Run fit as a user does; Lightning launches the other ranks."""
    command = arguments(devices, *args)
    return launch(partial(main, command), *command, program=lsoftmax_lightning.__main__)


def run_command(devices: int, *args: str) -> subprocess.CompletedProcess[str]:
    """Run fit in a new interpreter, until the last process ends.

    ``ddp_notebook`` needs it, because torch does not fork again in a fork of a process that has checked for GPUs.
    """
    command = [sys.executable, "-m", "lsoftmax_lightning", *arguments(devices, *args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.parametrize("counts", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_training_and_test_do_not_depend_on_the_number_of_processes(
    counts: tuple[int, ...], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for count in counts:
        done = run_on(count, partial(work, tmp_path))
        assert done.returncode == 0, done.stderr
    weights = {count: torch.load(tmp_path / f"weights_{count}.pt", weights_only=True) for count in counts}
    metrics = {count: json.loads((tmp_path / f"metrics_{count}.json").read_text()) for count in counts}
    for count in counts[1:]:
        # after 50 steps, weights differ only by the order of sums
        for run, one in weights[1].items():
            other = weights[count][run]
            difference = float(torch.stack([(other[name] - weight).abs().max() for name, weight in one.items()]).max())
            record_property(f"difference of weights, {count} processes, {run}", difference)
            assert difference < (1e-4 if "32" in run else 1e-12)
        # each image of a test set of any size counts once
        for size, one in metrics[1].items():
            if int(size) < count:
                assert metrics[count][size] == f"devices: must be at most the {size} samples, got {count}; use fewer."
            else:
                assert metrics[count][size] == pytest.approx(one, rel=1e-5, abs=1e-4)


def test_two_ranks_train_and_draw_as_one() -> None:
    weights, results = [], []
    for devices, start in ((1, run), (2, run_launched)):
        done = start(devices, "--dashboard.save=true")
        assert done.returncode == 0, done.stderr
        folder = Path("runs/digits", f"on{devices}")
        weights.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        results.append(json.loads((folder / "results.json").read_text()))
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)
    # 360 test images in batches of 64, the last of 40: none is counted twice or left out
    assert results[0]["test/acc"] == pytest.approx(results[1]["test/acc"], abs=1e-6)
    assert results[0]["test/loss"] == pytest.approx(results[1]["test/loss"], rel=1e-3)
    assert results[0]["test/acc"] > 0.8
    assert results[0]["test/angle"] == pytest.approx(results[1]["test/angle"], rel=1e-3)
    assert results[0]["test/centre_angle_min"] == pytest.approx(results[1]["test/centre_angle_min"], rel=1e-3)

    # every image is in the plots once, and only one rank draws
    runs = [Path("runs/digits", name) for name in ("on1", "on2")]
    names = [{path.name for path in (run / "dashboard").iterdir()} for run in runs]
    assert names[0] == names[1]
    for table in ("val_confusion_000060.csv", "test_confusion.csv"):
        assert len({(run / "dashboard" / table).read_text() for run in runs}) == 1
    for run_folder in runs:
        events = EventAccumulator(str(run_folder), size_guidance={"images": 0}).Reload()
        assert [event.step for event in events.Images("val/features")] == [20, 60]
        assert [event.step for event in events.Scalars("val/angle")] == [19, 39, 59]


@pytest.mark.skipif(not SHARDS_ON_CPUS, reason="ClassShardedStrategy refuses this release of torch on CPUs")
def test_two_nodes_and_sharded_classes_equal_one_rank() -> None:
    """The same command is started by torchrun, srun and with sharded classes."""
    short = ["--trainer.max_epochs=1", "--dashboard.every_n_epochs=0"]
    done = run(1, *short)
    assert done.returncode == 0, done.stderr
    nodes = ["--trainer.num_nodes=2", "--trainer.devices=1"]
    for name, environment, settings in (
        ("torchrun", partial(torchrun, nodes=2), nodes),
        ("srun", partial(srun, nodes=2), nodes),
        ("sharded", torchrun, ["--trainer.strategy=class_sharded"]),
    ):
        args = arguments(2, *short, f"--trainer.logger.version={name}", *settings)
        done = run_on(2, partial(main, args), environment)
        assert done.returncode == 0, done.stderr
        one, other = (
            torch.load(f"runs/digits/{version}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for version in ("on1", name)
        )
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        results = [json.loads(Path("runs/digits", version, "results.json").read_text()) for version in ("on1", name)]
        assert results[1] == pytest.approx(results[0], rel=1e-3, abs=1e-3)


def test_two_ranks_augment_and_verify_as_one(tmp_path: Path) -> None:
    write_lfw(tmp_path / "lfw", folds=4, count=5)  # an odd number of test images, with an incomplete last batch
    weights, results = [], []
    for devices in (1, 2):
        done = run(
            devices,
            f"--data.root={tmp_path / 'lfw'}",
            "--data.fold=4",
            "--data.val_fold=3",
            "--data.image_size=8",
            "--data.batch_size=8",
            "--data.crop_padding=2",
            "--trainer.max_steps=20",
            "--trainer.val_check_interval=2",
            "--model.pca_components=4",
            "--dashboard.every_n_epochs=0",
            config="lfw_fold.yaml",
            module="Faces",
        )
        assert done.returncode == 0, done.stderr
        folder = Path("runs/lfw_fold", f"on{devices}")
        weights.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        results.append(json.loads((folder / "results.json").read_text()))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)
    # fractions to 1e-6, angles to the precision of float32
    assert results[0] == pytest.approx(results[1], rel=1e-6, abs=1e-6)
    assert 0.5 < results[0]["test/auc"] <= 1


@pytest.mark.slow
def test_forked_and_spawned_ranks_equal_independent_ones() -> None:
    results, weights = [], []
    for strategy, start in (("ddp", run), ("ddp_notebook", run_command), ("ddp_spawn", run_launched)):
        settings = ["--trainer.max_epochs=2", "--dashboard.every_n_epochs=0", f"--trainer.strategy={strategy}"]
        settings += ["--trainer.callbacks+=of_processes.WritesExit", f"--trainer.logger.version={strategy}"]
        done = start(2, *settings)
        assert done.returncode == 0, done.stderr
        folder = Path("runs/digits", strategy)
        results.append(json.loads((folder / "results.json").read_text()))
        weights.append(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
        assert (folder / "config.yaml").is_file()
    assert {path.name for path in Path("runs/digits").iterdir()} == {"ddp", "ddp_notebook", "ddp_spawn"}
    # a rank that ends with threads of gloo sometimes aborts: both spawned ranks, in fit and in test
    assert [path.read_text() for path in Path().glob("exit_*")] == ["False"] * 4
    for other in (1, 2):
        assert results[other] == pytest.approx(results[0])
        torch.testing.assert_close(weights[other], weights[0])


def test_indivisible_batch_size_is_an_error() -> None:
    done = run(2, "--data.batch_size=65")
    assert done.returncode != 0
    assert (
        "error: batch_size: is global and must be divisible by the number of devices (2), got 65; use 64."
        in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_notebook", "ddp_spawn"])
def test_error_of_a_forked_or_spawned_rank_is_reported(strategy: str) -> None:
    done = run_command(2, "--data.batch_size=65", f"--trainer.strategy={strategy}")
    assert done.returncode == 1
    assert (
        "error: batch_size: is global and must be divisible by the number of devices (2), got 65; use 64."
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_divergence_ends_every_rank() -> None:
    args = arguments(2, "--model.optimizer.lr=1e30")
    done = run_on(2, partial(main, args), kill_others=False)
    assert done.returncode != 0
    assert "error: The training loss was NaN or infinite" in done.stderr


@pytest.mark.parametrize(
    ("start", "rank", "killed"), [(run_launched, 1, False), pytest.param(run_command, 0, True, marks=pytest.mark.slow)]
)
def test_a_rank_that_dies_ends_the_run(
    start: Callable[..., subprocess.CompletedProcess[str]], rank: int, killed: bool
) -> None:
    dies = (
        "--trainer.callbacks+=of_processes.Dies",
        f"--trainer.callbacks.rank={rank}",
        f"--trainer.callbacks.killed={killed}",
    )
    done = start(2, *dies)
    assert done.returncode != 0
    assert ("this rank fails" in done.stderr) is not killed
    assert ("error: another process of the run ended" in done.stderr) or not killed
    assert done.stderr.count("Traceback") == (not killed)
