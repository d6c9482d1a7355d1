"""Private parts of libraries, and texts of their errors and warnings, on which the package relies."""

import inspect
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities._pytree import _tree_flatten
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, SequentialLR
from torch.utils.data import DataLoader
from torch.utils.tensorboard.summary import scalar

from lsoftmax_lightning import compat, library_messages
from lsoftmax_lightning.errors import DataError, InputError
from lsoftmax_lightning.library_messages import ADVICE
from lsoftmax_lightning.lightning_cli import InstantiatedCLI
from lsoftmax_lightning.lr_schedulers import FractionalMultiStepLR
from lsoftmax_lightning.signals import ignore_signals
from lsoftmax_lightning.user_errors import USER_ERRORS, user_message

from .helpers.forked import run_on
from .helpers.training import make_trainer


class Model(BoringModel):
    def __init__(self, width: int = 1, optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.5)) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="optimizer")
        self.width, self.optimizer = width, optimizer


class OverridingLogger(TensorBoardLogger):
    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        super().log_metrics(*args, **kwargs)


def test_current_datamodule_ignores_earlier_runs() -> None:
    trainer, data = make_trainer(fast_dev_run=True), BoringDataModule()
    assert compat.current_datamodule(trainer) is None
    for run in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        run(BoringModel(), datamodule=data)
        assert compat.current_datamodule(trainer) is data
        run(BoringModel(), DataLoader(data.random_full))
        assert compat.current_datamodule(trainer) is None
        assert trainer.datamodule is data  # the reason for this function


class Recorder(compat.CommandLine):
    """Record the hooks instead of running the command."""

    def __init__(self, args: list[str]) -> None:
        self.hooks: list[str] = []
        super().__init__(Model, BoringDataModule, subclass_mode_model=True, subclass_mode_data=True, args=args)

    def add_command_arguments(self, parser: Any, command: str) -> None:
        parser.add_argument(f"--of_{command}")

    def before_fit(self) -> None:
        self.hooks.append("before_fit")

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        self.hooks.append("fit")

    def run_command(self) -> None:
        self.hooks.append("run_command")
        if self.config.fit.of_fit == "run":
            super().run_command()


DATA = f"{BoringDataModule.__module__}.{BoringDataModule.__name__}"
COMMAND = [
    "fit",
    f"--model={__name__}.Model",
    f"--data={DATA}",
    "--seed_everything=0",
    "--trainer.logger=false",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture(autouse=True)
def _no_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the arguments of the process, because LightningCLI warns if they are given, too."""
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.mark.parametrize("runs", [True, False])
def test_a_command_runs_by_its_public_hook(runs: bool) -> None:
    cli = Recorder([*COMMAND, *(["--of_fit=run"] if runs else [])])
    assert cli.hooks == (["run_command", "before_fit", "fit"] if runs else ["run_command"])
    assert isinstance(cli.trainer, Trainer)


def test_parser_of_a_command_has_only_its_arguments() -> None:
    cli = Recorder(COMMAND)
    settings = yaml.safe_load(cli.command_parser.dump(cli.config.fit, skip_none=False))
    assert settings["of_fit"] is None
    assert "of_test" not in settings


def test_settings_of_a_checkpoint_do_not_replace_those_of_the_user() -> None:
    torch.save({"hyper_parameters": {"width": 2}, "state_dict": {}}, "two.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        assert Recorder([*COMMAND, "--ckpt_path=two.ckpt"]).model.width == 1
        patch.delattr(compat.CommandLine, "_parse_ckpt_path")
        assert Recorder([*COMMAND, "--ckpt_path=two.ckpt"]).model.width == 2


def test_settings_of_a_parser_have_types() -> None:
    parser = ArgumentParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--group.part", type=Part)
    parser.add_class_arguments(Model, "model", fail_untyped=False)
    settings = compat.settings_of_parser(parser)
    assert settings["group.part"] is Part
    assert settings["model.width"] is int
    assert settings["config"] is None
    options = {"help", "config", "print_config"}
    assert settings.keys() == options | {"group.part", "model.width", "model.optimizer"}


def test_known_subclasses_exclude_abstract_and_local_ones() -> None:
    class Local(ModelCheckpoint): ...

    found = compat.known_subclasses(ModelCheckpoint)
    assert "lsoftmax_lightning.callbacks.BestCheckpoint" in found
    assert not {name for name in found if name.endswith(("CheckpointHooks", "Local"))}  # abstract; local


@pytest.mark.parametrize(
    ("args", "missing"),
    [
        ([f"--model={__name__}.Needs"], (["depth"], f"{__name__}.Needs")),
        ([], (["model"], None)),
    ],
)
def test_required_settings_are_read_from_the_message(args: list[str], missing: tuple[list[str], str | None]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Needs, "model", required=True)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args(args)
    assert library_messages.missing_settings(str(caught.value)) == missing


class Needs:
    def __init__(self, depth: int) -> None: ...


def test_an_optimizer_of_the_command_line_copies_and_pickles() -> None:
    settings = [*COMMAND, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.25", "--model.width=3"]
    cli = Recorder(settings)
    made = pickle.loads(pickle.dumps(cli.model.optimizer))
    assert isinstance(made, partial)
    assert made.func is SGD
    assert made([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.25
    assert cli.model.hparams["width"] == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "plain_partial", lambda value: value)
        optimizer = Recorder(settings).model.optimizer
    assert optimizer.func.__module__.startswith("jsonargparse")
    assert optimizer.args[-1] is SGD


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_parser", ["self", "subcommand"]),
        ("_run_subcommand", ["self", "subcommand"]),
        ("_prepare_subcommand_parser", ["self", "klass", "subcommand", "kwargs"]),
        ("_parse_ckpt_path", ["self"]),
        ("_add_instantiators", ["self"]),
    ],
)
def test_overridden_private_methods_have_the_expected_parameters(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(LightningCLI, name)).parameters) == parameters


@pytest.mark.parametrize(
    ("strategy", "other_processes"), [("auto", False), ("ddp", False), ("ddp_spawn", True), ("ddp_notebook", True)]
)
def test_forked_and_spawned_ranks_are_distinguished_from_launched_ones(strategy: str, other_processes: bool) -> None:
    trainer = make_trainer(strategy=strategy, devices=2 if strategy != "auto" else 1)
    trainer.strategy._configure_launcher()
    assert compat.trains_in_other_processes(trainer) == other_processes


def test_the_trainer_of_a_module_is_found() -> None:
    model, trainer = BoringModel(), make_trainer()
    assert compat.trainer_of(model) is None
    model.trainer = trainer
    assert compat.trainer_of(model) is trainer


class Sharded(ModelParallelStrategy):
    """Data parallelism over both ranks, with synchronised batch normalisation."""

    def setup_environment(self) -> None:
        compat.shard_over_all_ranks(self)
        super().setup_environment()
        model = BoringModel()
        model.layer = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2))
        compat.synchronise_batch_norm(self, model)
        print(self.device_mesh["data_parallel"].size(), type(model.layer[0]).__name__, flush=True)


class Configured(BoringModel):
    def configure_model(self) -> None: ...


def start_sharded(sync_batchnorm: bool) -> None:
    strategy = Sharded(tensor_parallel_size=1)
    trainer = make_trainer(strategy=strategy, devices=2, fast_dev_run=True, sync_batchnorm=sync_batchnorm)
    trainer.fit(Configured(), BoringDataModule())


@pytest.mark.parametrize("sync_batchnorm", [True, False])
def test_a_strategy_shards_over_all_ranks(sync_batchnorm: bool) -> None:
    done = run_on(2, partial(start_sharded, sync_batchnorm))
    assert done.stdout.splitlines() == 2 * [f"2 {'SyncBatchNorm' if sync_batchnorm else 'BatchNorm1d'}"], done.stderr


def test_logged_steps_are_known_in_advance() -> None:
    steps = []

    class Steps(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if compat.logs_this_step(trainer):
                steps.append(trainer.global_step)

    make_trainer(max_steps=8, log_every_n_steps=3, callbacks=[Steps()]).fit(BoringModel())
    assert steps == [2, 5]


def test_rnns_override_apply() -> None:
    assert "_apply" in vars(nn.RNNBase)  # what LSoftmaxModule overrides


def test_launched_ranks_are_killed() -> None:
    trainer = make_trainer(strategy=DDPStrategy(), devices=2)
    trainer.strategy._configure_launcher()
    launcher: Any = trainer.strategy.launcher
    assert launcher.procs == []
    with subprocess.Popen(["sleep", "60"]) as rank:
        launcher.procs.append(rank)
        compat.kill_launched_ranks(trainer, seconds=0)
        assert rank.wait(timeout=10) == -9
    compat.kill_launched_ranks(make_trainer(), seconds=60)  # without a launcher


class Written(compat.CheckpointHooks):
    def __init__(self) -> None:
        super().__init__("written", filename="last", enable_version_counter=False)
        self.states: list[tuple[bool, bool, bool]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        before = self.is_written(trainer), self.skips_writing(trainer)
        self.write_checkpoint(trainer, self.format_checkpoint_name({}))
        assert self.is_written(trainer)
        assert self.skips_writing(trainer)
        assert before == (False, False)

    def after_write(self, trainer: Trainer, filepath: str) -> None:
        assert torch.load(filepath, weights_only=True)["global_step"] == trainer.global_step
        self.states.append((self.is_written(trainer), self.skips_writing(trainer), Path(filepath).is_file()))


def test_a_checkpoint_is_written_by_the_public_methods() -> None:
    callback = Written()
    trainer = make_trainer(callbacks=[callback], enable_checkpointing=True, max_steps=3, log_every_n_steps=1)
    trainer.fit(BoringModel(), BoringDataModule())
    assert callback.states == 3 * [(True, True, True)]  # not again at the end of the epoch


def test_a_csv_logger_warns_about_a_used_folder() -> None:
    Path("logs/used").mkdir(parents=True)
    Path("logs/used/.lock").touch()
    with pytest.warns(UserWarning, match=library_messages.USED_LOG_WARNING):
        CSVLogger(".", name="logs", version="used").experiment  # noqa: B018


def test_lightning_warns_about_a_used_folder() -> None:
    Path("used").mkdir()
    Path("used", "last.ckpt").write_text("")
    trainer = make_trainer(callbacks=[ModelCheckpoint("used")], enable_checkpointing=True, fast_dev_run=False)
    with pytest.warns(UserWarning, match=library_messages.USED_FOLDER_WARNING):
        trainer.fit(BoringModel(), BoringDataModule())


def test_leaf_spec_warning_is_caused_by_lightning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _tree_flatten([1, 2])
        warnings.filterwarnings("ignore", library_messages.LEAF_SPEC_WARNING)
        _tree_flatten([1, 2])
    assert len(caught) == (torch.__version__ >= "2.14")


def test_a_scheduler_that_begins_later_calls_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    later = FractionalMultiStepLR(optimizer, [0.5], total_steps=4)
    calls = []
    closed_form = FractionalMultiStepLR.get_closed_form_lr
    monkeypatch.setattr(
        FractionalMultiStepLR, "get_closed_form_lr", lambda self: calls.append(self) or closed_form(self)
    )
    schedule = SequentialLR(optimizer, [ConstantLR(optimizer, 0.5), later], milestones=[2])
    for _ in range(3):
        optimizer.step()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
            schedule.step()
    assert calls == [later]


def test_the_last_learning_rate_can_be_set() -> None:
    scheduler = FractionalMultiStepLR(SGD([nn.Parameter(torch.zeros(1))], lr=0.5), [0.5], total_steps=4)
    scheduler.set_last_lr([0.125])
    assert scheduler.get_last_lr() == [0.125]


def test_the_schedulers_of_a_chain_are_found() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedulers = [ConstantLR(optimizer), ConstantLR(optimizer)]
    assert compat.schedulers_in(ChainedScheduler(schedulers, optimizer)) == schedulers
    assert compat.schedulers_in(schedulers[0]) == [schedulers[0]]


def test_assert_on_device_raises_for_a_false_condition() -> None:
    compat.assert_on_device(torch.tensor(True))
    with pytest.raises(RuntimeError):
        compat.assert_on_device(torch.tensor(False))


def test_summaries_are_written_without_the_default_metric() -> None:
    logger = TensorBoardLogger("logs", name="", version="")
    compat.disable_default_hp_metric(logger)
    logger.log_hyperparams({"margin": 4})
    compat.add_summary(logger, scalar("loss", 0.5))
    logger.finalize("success")
    events = EventAccumulator("logs").Reload()
    assert events.Tags()["scalars"] == ["loss"]


@pytest.mark.parametrize("prefix", ["", "run"])
def test_scalars_of_a_step_are_one_event(prefix: str, tmp_path: Path) -> None:
    for name, logger_class in (("one event", TensorBoardLogger), ("an event each", OverridingLogger)):
        logger = logger_class(tmp_path, name=name, prefix=prefix)
        compat.log_scalars(make_trainer(logger=logger), {"train/angle": 30.0, "lr": float("nan")})
        logger.finalize("success")
    events = {
        name: [event for file in (tmp_path / name).rglob("events*") for event in EventFileLoader(str(file)).Load()][1:]
        for name in ("one event", "an event each")
    }
    assert [len(found) for found in events.values()] == [1, 2]
    written, expected = (
        [(value.tag, str(value), event.step) for event in found for value in event.summary.value]
        for found in events.values()
    )
    assert written == expected


def test_scalars_are_logged_on_other_loggers() -> None:
    logger = CSVLogger(".")
    trainer = make_trainer(logger=logger, max_steps=4)
    trainer.fit(BoringModel(), BoringDataModule())
    compat.log_scalars(trainer, {"lr": 0.5})
    logger.save()
    assert Path(logger.log_dir, "metrics.csv").read_text() == "lr,step\n0.5,4\n"


def test_a_checkpoint_has_counts_of_epochs() -> None:
    trainer = make_trainer(max_epochs=1, limit_train_batches=1, fast_dev_run=False)
    trainer.fit(BoringModel(), BoringDataModule())
    trainer.save_checkpoint("some.ckpt")
    progress = compat.epoch_progress(torch.load("some.ckpt", weights_only=True))
    assert progress.keys() == {"total", "current"}
    assert progress["current"] == {"ready": 1, "started": 1, "processed": 1, "completed": 1}


class Part:
    pass


class Refusing(Part):
    def __init__(self) -> None:
        raise InputError("of the constructor")


class Whole:
    def __init__(self, part: Part | None = None) -> None:
        pass


def test_constructor_error_is_extracted_from_the_parser_error() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Whole, "whole")
    config = parser.parse_args([f"--whole={__name__}.Whole", f"--whole.part={__name__}.Refusing"])
    with pytest.raises(ValueError, match="of the constructor") as caught:
        parser.instantiate_classes(config)
    assert library_messages.hidden_constructor_message(caught.value) in (None, "of the constructor")
    assert str(user_message(caught.value)) == "of the constructor"


def test_code_in_a_checkpoint_is_named() -> None:
    torch.save(Path("unsafe"), "unsafe.ckpt")
    with pytest.raises(UnpicklingError) as caught:
        torch.load("unsafe.ckpt", weights_only=True)
    assert library_messages.refused_code(caught.value) in ("pathlib.PosixPath", "pathlib._local.PosixPath")
    assert library_messages.refused_code(UnpicklingError("anything else")) is None


class Damaged:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise DataError("a.png is damaged.\nTake it away.")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_message_of_a_worker_is_extracted_from_its_traceback(num_workers: int) -> None:
    loader: DataLoader[Any] = DataLoader(Damaged(), num_workers=num_workers)  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert ("Traceback" in str(caught.value)) == bool(num_workers)
    assert library_messages.worker_message(caught.value) == "a.png is damaged.\nTake it away."


@pytest.mark.parametrize("num_workers", [0, 1])
def test_end_workers_ends_the_workers_of_a_kept_iterator(num_workers: int) -> None:
    before = set(multiprocessing.active_children())
    batches = iter(DataLoader(range(100), num_workers=num_workers, worker_init_fn=ignore_signals))  # type: ignore[arg-type]
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == num_workers
    compat.end_workers(batches)
    assert set(multiprocessing.active_children()) <= before  # a worker of an earlier test may end in the meantime


def fail(rank: int, error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "message"), [(InputError("two\nlines"), "two\nlines"), (ValueError("of somebody else"), None)]
)
def test_message_of_a_spawned_rank_is_extracted_from_its_traceback(error: Exception, message: str | None) -> None:
    with pytest.raises(ProcessRaisedException) as caught:
        torch.multiprocessing.start_processes(fail, (error,), nprocs=1, start_method="fork")
    assert library_messages.spawned_rank_message(caught.value, USER_ERRORS) == message


def too_few_values() -> object:
    return nn.BatchNorm1d(3)(torch.zeros(1, 3))


def too_small_for_a_kernel() -> object:
    return F.conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 5, 5))


def too_small_for_a_pooling() -> object:
    return F.max_pool2d(torch.zeros(1, 1, 1, 1), 2)


def too_much_memory() -> object:
    return torch.empty(2**58, dtype=torch.uint8)


def port_in_use() -> object:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return dist.TCPStore("127.0.0.1", taken.getsockname()[1], 1, is_master=True)


def synchronised_on_cpus() -> object:
    dist.init_process_group("gloo", init_method=f"file://{Path('group').absolute()}", rank=0, world_size=1)
    try:
        network = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
        return nn.parallel.DistributedDataParallel(network)(torch.zeros(2, 2))
    finally:
        dist.destroy_process_group()


FAILURES: dict[str, Callable[[], object]] = {
    "Expected more than 1 value per channel": too_few_values,
    "Kernel size can't be greater than actual input size": too_small_for_a_kernel,
    "Output size is too small": too_small_for_a_pooling,
    "SyncBatchNorm layers only work with GPU": synchronised_on_cpus,
    "can't allocate memory": too_much_memory,
    "EADDRINUSE": port_in_use,
}
PEER_DIED = "gloo/transport/tcp/pair.cc"


@pytest.mark.parametrize("text", FAILURES)
def test_errors_of_torch_match_the_advice(text: str) -> None:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        FAILURES[text]()
    assert user_message(caught.value) == ADVICE[text]


def lose_a_rank() -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(0)
    try:
        for _ in range(100):
            dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        print(error)
        os._exit(0)


def test_gloo_names_its_file_when_a_rank_dies() -> None:
    done = run_on(2, lose_a_rank)
    assert PEER_DIED in done.stdout, done.stderr


def test_every_advice_is_tested() -> None:
    assert {*FAILURES, PEER_DIED} == ADVICE.keys()


def test_config_dump_equals_that_of_lightning() -> None:
    cli = InstantiatedCLI(["fit", "--config=digits.yaml"])
    checked = cli.parser.dump(cli.config, skip_link_targets=False, skip_none=False, format="yaml")
    assert cli.config_dump == yaml.safe_load(checked)["fit"]
