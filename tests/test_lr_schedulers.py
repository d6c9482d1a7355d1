"""Learning rate milestones as fractions of the run."""

import math
import re
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler, MultiStepLR, SequentialLR, StepLR
from torch.utils.data import IterableDataset

from lsoftmax_lightning.callbacks import ExactResume
from lsoftmax_lightning.cli import CONFIGS, main
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.lr_schedulers import FractionalMultiStepLR

from .helpers.command_line import QUIET, fails
from .helpers.training import BlobsDataModule, make_model, make_trainer

RESUMED = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`")
# decay steps of each shipped config, and length of its run
SHIPPED: dict[str, tuple[list[int], int]] = {
    "cifar10": ([12000, 15000], 18000),
    "cifar100": ([12000, 15000], 18000),
    "cifar10plus": ([12000, 15000], 18000),
    "digits": ([400, 500], 600),
    "fashion_mnist": ([533, 667], 800),
    "folder": ([15 * 1000, 25 * 1000], 30 * 1000),  # 1000 steps an epoch
    "lfw": ([16000, 24000], 28000),
    "lfw_fold": ([500, 700], 800),
    "mnist": ([12000, 15000], 18000),
    "mnist_1000": ([400, 500], 600),
    "mnist_2d": ([1400, 1750], 2100),
}


def make_optimizer(lr: Any = 0.1) -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """Return the learning rate of each step."""
    found = []
    for _ in range(steps):
        found.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def decay_steps(found: list[float]) -> list[int]:
    """Return the steps at which the learning rate changes."""
    return [step for step, (before, after) in enumerate(pairwise(found), start=1) if after != before]


class Recorder(Callback):
    """Record the learning rate of each optimiser step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def halves(optimizer: Optimizer) -> LRScheduler:
    return FractionalMultiStepLR(optimizer, [0.5, 0.75])


def train(resume_from: Path | None = None, save_in: Path | None = None, **settings: Any) -> tuple[Any, list[float]]:
    """Train with 8 batches per epoch; return the module and the learning rate of each step."""
    recorder = Recorder()
    callbacks: list[Callback] = [recorder, ExactResume()]
    if save_in:
        callbacks.append(ModelCheckpoint(save_in, filename="{step}", save_top_k=-1, every_n_train_steps=1))
    model = make_model(lr_scheduler=halves)
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=save_in is not None, **settings)
    trainer.fit(model, BlobsDataModule(), ckpt_path=resume_from, weights_only=True if resume_from else None)
    return model, recorder.rates


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_decays_in_a_plain_loop_equal_multi_step_lr(lr: Any) -> None:
    found, expected = (
        rates(scheduler, 10)
        for scheduler in (
            FractionalMultiStepLR(make_optimizer(deepcopy(lr)), [0.4, 0.81], 0.5, total_steps=10),
            MultiStepLR(make_optimizer(deepcopy(lr)), [4, 8], 0.5),
        )
    )
    assert found == expected
    assert decay_steps(found) == [4, 8]


@pytest.mark.parametrize(("total_steps", "decays"), [(1, []), (2, [1]), (7, [4, 5]), (100, [50, 75])])
def test_a_milestone_is_rounded_to_the_nearest_step(total_steps: int, decays: list[int]) -> None:
    scheduler = FractionalMultiStepLR(make_optimizer(), [0.5, 0.75], total_steps=total_steps)
    assert decay_steps(rates(scheduler, total_steps)) == decays


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # from SequentialLR of torch 2.6
def test_combination_with_warmup_equals_multi_step_lr() -> None:
    def warmup_and(second: type[LRScheduler], *args: Any, **kwargs: Any) -> list[list[float]]:
        combined: list[LRScheduler] = []
        optimizer = make_optimizer()
        combined.append(ChainedScheduler([LinearLR(optimizer, total_iters=3), second(optimizer, *args, **kwargs)]))
        optimizer = make_optimizer()
        schedulers = [LinearLR(optimizer, total_iters=3), second(optimizer, *args, **kwargs)]
        combined.append(SequentialLR(optimizer, schedulers, milestones=[3]))
        return [rates(scheduler, 12) for scheduler in combined]

    found = warmup_and(FractionalMultiStepLR, [0.5, 0.75], total_steps=8)
    assert found == warmup_and(MultiStepLR, [4, 6])


def test_last_epoch_continues_from_a_step() -> None:
    optimizer = make_optimizer()
    whole = rates(FractionalMultiStepLR(optimizer, [0.5, 0.75], total_steps=8), 8)
    optimizer = SGD([{"params": nn.Parameter(torch.zeros(1)), "lr": whole[5], "initial_lr": 0.1}])
    scheduler = FractionalMultiStepLR(optimizer, [0.5, 0.75], total_steps=8, last_epoch=4)
    assert rates(scheduler, 3) == whole[5:]


def test_state_dict_is_plain_and_resumes(tmp_path: Path) -> None:
    optimizer = make_optimizer()
    scheduler = FractionalMultiStepLR(optimizer, [0.5, 0.75], total_steps=8)
    whole = rates(scheduler, 5)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state.pt")
    whole += rates(scheduler, 3)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert "total_steps" not in saved["scheduler"]
    optimizer = make_optimizer()
    scheduler = FractionalMultiStepLR(optimizer, [0.1], total_steps=8)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    assert scheduler.milestones == [0.5, 0.75]
    assert rates(scheduler, 3) == whole[5:]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 1}, 8),
        ({"max_epochs": 3}, 24),
        ({"max_epochs": -1, "max_steps": 20}, 20),
        ({"max_epochs": 2, "max_steps": 12}, 12),
        ({"max_epochs": 5, "limit_train_batches": 4}, 20),
        ({"max_epochs": 4, "accumulate_grad_batches": 3}, 12),  # 8 batches are 3 steps
    ],
    ids=str,
)
def test_the_decays_follow_the_length_of_the_run(settings: dict[str, Any], steps: int) -> None:
    _, found = train(**settings)
    assert len(found) == steps
    assert decay_steps(found) == [steps // 2, steps * 3 // 4]
    assert found[:: steps // 2] == pytest.approx([0.1, 0.01])


def test_an_explicit_total_steps_takes_precedence_over_the_run() -> None:
    recorder = Recorder()
    model = make_model(lr_scheduler=lambda optimizer: FractionalMultiStepLR(optimizer, [0.5], total_steps=4))
    make_trainer(callbacks=[recorder]).fit(model, BlobsDataModule())
    assert decay_steps(recorder.rates) == [2]


@RESUMED
@pytest.mark.parametrize("accumulate_grad_batches", [1, 3])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, accumulate_grad_batches: int) -> None:
    settings = {"max_epochs": 3, "accumulate_grad_batches": accumulate_grad_batches}
    whole, found = train(save_in=tmp_path, **settings)
    for step in range(1, len(found)):  # in the middle of an epoch and at its end, before and after each milestone
        resumed, rest = train(resume_from=tmp_path / f"step={step}.ckpt", **settings)
        assert rest == found[step:], step
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (step, name)


@RESUMED
def test_a_run_resumed_with_another_length_follows_that_length(tmp_path: Path) -> None:
    train(save_in=tmp_path, max_epochs=2)
    longer, shorter = (train(max_epochs=max_epochs)[1] for max_epochs in (4, 1))
    for step in (5, 9, 13, 16):  # of 32, where no milestone is passed yet before step 16
        _, rest = train(resume_from=tmp_path / f"step={step}.ckpt", max_epochs=4)
        assert rest == pytest.approx(longer[step:])
    _, rest = train(resume_from=tmp_path / "step=5.ckpt", max_epochs=1)
    assert rest == pytest.approx(shorter[5:])


def test_second_fit_continues_from_the_step_of_the_trainer() -> None:
    recorder = Recorder()
    model, data = make_model(lr_scheduler=halves), BlobsDataModule()
    trainer = make_trainer(callbacks=[recorder])
    trainer.fit(model, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data)
    assert recorder.rates[8:] == pytest.approx([0.01] * 4 + [0.001] * 4)


@RESUMED
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_run_started_with_multi_step_lr_continues(tmp_path: Path, interval: Any) -> None:
    milestones = [16, 24] if interval == "step" else [2, 3]
    saved = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    model = make_model(lr_scheduler=lambda o: MultiStepLR(o, milestones), lr_scheduler_interval=interval)
    recorder = Recorder()
    trainer = make_trainer(callbacks=[saved, recorder], enable_checkpointing=True, max_epochs=4)
    trainer.fit(model, BlobsDataModule())
    for step in (15, 16, 17, 25):
        _, rest = train(resume_from=tmp_path / f"step={step}.ckpt", max_epochs=4)
        assert rest == pytest.approx(recorder.rates[step:])


@pytest.mark.parametrize("milestones", [[400, 500], [0.5, 1], [0, 0.5], [0.75, 0.5], [0.5, 0.5], [math.nan]], ids=str)
def test_milestones_that_are_not_increasing_fractions_are_rejected(milestones: list[float]) -> None:
    with pytest.raises(InputError, match=rf"^milestones: .*got {re.escape(str(milestones))}; .*MultiStepLR for"):
        FractionalMultiStepLR(make_optimizer(), milestones)


@pytest.mark.parametrize("gamma", [0, -0.1, 1.5, math.nan])
def test_gamma_out_of_range_is_rejected(gamma: float) -> None:
    with pytest.raises(InputError, match=r"^gamma: must be above 0 and at most 1"):
        FractionalMultiStepLR(make_optimizer(), [0.5], gamma)


@pytest.mark.parametrize("total_steps", [0, -1])
def test_total_steps_out_of_range_is_rejected(total_steps: int) -> None:
    with pytest.raises(InputError, match=r"^total_steps: .* at least 1 step"):
        FractionalMultiStepLR(make_optimizer(), [0.5], total_steps=total_steps)


def test_the_first_step_needs_the_length_of_the_run() -> None:
    scheduler = FractionalMultiStepLR(make_optimizer(), [0.5])
    scheduler.optimizer.step()
    with pytest.raises(
        InputError, match=r"^total_steps: must be set before the first step, got None; pass total_steps"
    ):
        scheduler.step()


def test_the_state_of_another_scheduler_is_rejected() -> None:
    state = StepLR(make_optimizer(), 1).state_dict()
    with pytest.raises(InputError, match=r"^lr_scheduler: the checkpoint must contain the state of"):
        FractionalMultiStepLR(make_optimizer(), [0.5], total_steps=2).load_state_dict(state)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(1, 8, 8), 0


class EndlessData(BlobsDataModule):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Endless(), batch_size=2)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (BlobsDataModule, {"max_epochs": -1, "max_time": "00:01:00:00"}),
        (EndlessData, {"max_epochs": 2, "val_check_interval": 5}),
    ],
    ids=["max_time", "data_without_length"],
)
def test_a_run_of_unknown_length_is_rejected_before_it_trains(data: Any, settings: dict[str, Any]) -> None:
    recorder = Recorder()
    with pytest.raises(InputError, match=r"^total_steps: .* must be known .*; set the Trainer's max_steps"):
        make_trainer(callbacks=[recorder], **settings).fit(make_model(lr_scheduler=halves), data())
    assert recorder.rates == []


def test_data_without_length_train_with_max_steps() -> None:
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], max_epochs=-1, max_steps=8, val_check_interval=5)
    trainer.fit(make_model(lr_scheduler=halves), EndlessData())
    assert decay_steps(recorder.rates) == [4, 6]


def test_an_interval_of_epochs_is_rejected_before_the_run_trains() -> None:
    recorder = Recorder()
    model = make_model(lr_scheduler=halves, lr_scheduler_interval="epoch")
    with pytest.raises(InputError, match=r"^lr_scheduler_interval: .* got interval 'epoch'.*; set the interval"):
        make_trainer(callbacks=[recorder]).fit(model, BlobsDataModule())
    assert recorder.rates == []


def test_command_line_accepts_the_bare_name_and_resumes() -> None:
    fit = ["fit", "--config=digits.yaml", *QUIET, "--trainer.limit_train_batches=4", "--ckpt_path=last"]
    with pytest.warns(UserWarning, match=r"There is no"):
        cli = main([*fit, "--trainer.max_epochs=3"])
    assert cli is not None
    (config,) = cli.trainer.lr_scheduler_configs
    assert isinstance(config.scheduler, FractionalMultiStepLR)
    assert config.scheduler.total_steps == 12
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0005)
    saved = yaml.safe_load(Path("runs/digits/m4-s0/config.yaml").read_text())
    scheduler = saved["model"]["init_args"]["lr_scheduler"]
    assert scheduler["class_path"] == "lsoftmax_lightning.lr_schedulers.FractionalMultiStepLR"
    cli = main([*fit, "--trainer.max_epochs=4"])  # step 12 of 16 is between the milestones
    assert cli is not None
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0005)
    with pytest.warns(UserWarning, match=r"changes of them have no effect"):
        cli = main([*fit, "--trainer.max_epochs=5", "--model.lr_scheduler.milestones=[0.9]"])
    assert cli is not None
    assert cli.trainer.lr_scheduler_configs[0].scheduler.milestones == [0.66667, 0.83333]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.lr_scheduler.milestones=[400, 500]"], ["milestones: must be", "[400.0, 500.0]", "MultiStepLR"]),
        (["--model.lr_scheduler.gamma=2"], ["gamma: must be", "got 2.0"]),
        (["--model.lr_scheduler_interval=epoch"], ["lr_scheduler_interval: ", "'step'"]),
        (["--trainer.max_epochs=-1", "--trainer.max_time=00:01:00:00"], ["total_steps: ", "max_time"]),
    ],
)
def test_mistakes_get_one_clear_error(args: list[str], message: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = fails(capsys, "fit", "--config=digits.yaml", *QUIET, *args)
    for part in message:
        assert part in printed


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_decays_at_its_steps(name: str) -> None:
    decays, total_steps = SHIPPED[name]
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    model, trainer = settings["model"]["init_args"], settings["trainer"]
    assert model["lr_scheduler"]["class_path"] == "FractionalMultiStepLR"
    assert model.get("lr_scheduler_interval", "step") == "step"
    assert trainer.get("max_steps", total_steps) == total_steps
    assert total_steps % trainer.get("max_epochs", 1) == 0
    arguments = model["lr_scheduler"]["init_args"]
    found = rates(FractionalMultiStepLR(make_optimizer(), **arguments, total_steps=total_steps), total_steps)
    assert decay_steps(found) == decays
    assert found[:: total_steps - 1] == pytest.approx([0.1, 0.001])
