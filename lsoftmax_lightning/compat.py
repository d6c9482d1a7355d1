"""Public names for the private parts of Lightning, jsonargparse and torch that this package needs.

``tests/test_compat.py`` fails if a library changes one of them. The docstrings give versions that have them.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from abc import ABC, abstractmethod
from argparse import Action
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse._typehints import get_all_subclass_paths
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, _InstantiatorFn
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from typing_extensions import override

MAX_LISTED_CLASSES = 20


class CommandLine(LightningCLI):
    """LightningCLI with public names for the private methods that are overridden or called (Lightning 2.6.6).

    It differs from LightningCLI in three ways. Optimizer and scheduler callables can be copied and pickled; those of
    jsonargparse contain the parser. The settings in the checkpoint of ``--ckpt_path`` do not replace those of the user.
    If the first argument is a command, the other commands get no arguments, which would take a fifth of the start-up.

    Args:
        *args: Positional arguments of LightningCLI.
        **kwargs: Keyword arguments of LightningCLI.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        words = kwargs.get("args")
        first = (sys.argv[1:] if words is None else words)[:1]
        # options before the command, such as a config file, may contain settings of all commands
        self._used_commands = self.subcommands().keys() & first or self.subcommands().keys()
        super().__init__(*args, **kwargs)

    def add_command_arguments(self, parser: LightningArgumentParser, command: str) -> None:
        """Add the arguments of a command to its parser; a hook for subclasses."""

    def run_command(self) -> None:
        """Run the command and its hooks, such as ``before_fit``."""
        super()._run_subcommand(str(self.subcommand))

    @property
    def command_parsers(self) -> dict[str, LightningArgumentParser]:
        """Parser of each command."""
        return {command: self._parser(command) for command in self.subcommands()}

    @property
    def command_parser(self) -> LightningArgumentParser:
        """Parser of the command in use."""
        return self._parser(self.subcommand)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand not in self._used_commands:
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.add_command_arguments(parser, subcommand)
        return parser

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command()

    @override
    def _parse_ckpt_path(self) -> None:
        pass

    @override
    def _dump_config(self) -> None:
        if not hasattr(self, "config_dump"):  # once, and without Lightning's second validation
            settings: Any = {"skip_link_targets": False, "skip_none": False, "skip_validation": True, "format": "yaml"}
            self.config_dump = yaml.safe_load(self.parser.dump(self.config, **settings))[self.subcommand]

    @override
    def _add_instantiators(self) -> None:
        for key, kind in (("model", LightningModule), ("data", LightningDataModule)):
            self.parser.add_instantiator(_PlainInstantiator(cli=self, key=key), kind, subclasses=True)


class _PlainInstantiator(_InstantiatorFn):
    def __call__(self, class_type: Any, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        kwargs = {name: plain_partial(value) for name, value in kwargs.items()}
        return super().__call__(class_type, *args, applied_instantiation_links=applied_instantiation_links, **kwargs)


class ShortClassLists(DefaultHelpFormatter):
    """Help formatter without long lists of classes and without docstring markup (jsonargparse 4.40 and 4.53)."""

    @override
    def _get_help_string(self, action: Action) -> str:
        text = str(super()._get_help_string(action))
        text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", text).replace("``", "")
        before, _, classes = text.partition(", known subclasses: ")
        names = classes.removesuffix(")").split(", ")
        if len(names) <= MAX_LISTED_CLASSES:
            return text
        return f"{before}, or the import path of one of {len(names)} known classes)"


def plain_partial(value: Any) -> Any:
    """Replace a partial of jsonargparse by a partial of the class; return other values unchanged.

    jsonargparse 4.40 and 4.53 create an optimizer or scheduler by a method of the parser, with the class as its last
    argument.
    """
    if not isinstance(value, partial) or not str(value.func.__module__).startswith("jsonargparse"):
        return value
    return partial(value.args[-1], **{name: plain_partial(setting) for name, setting in value.keywords.items()})


def settings_of_parser(parser: ArgumentParser) -> dict[str, Any]:
    """Return the settings of a parser and their types (jsonargparse 4.40 and 4.53).

    The type is None for an option without one. Groups are omitted; the settings in them are included.
    """
    actions = (action for action in parser._actions if not action.dest.endswith(".help"))
    types = {action.dest: getattr(action, "_typehint", None) for action in actions}
    groups = {name.rpartition(".")[0] for name in types}
    return {name: kind for name, kind in types.items() if name not in groups}


def known_subclasses(kind: type) -> list[str]:
    """Return the import paths of a class and its subclasses, without abstract ones (jsonargparse 4.40 and 4.53)."""
    return get_all_subclass_paths(kind)


def trains_in_other_processes(trainer: Trainer) -> bool:
    """Return whether the ranks are forked or spawned processes, which end with the training (Lightning 2.6.6)."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def signal_launched_ranks(trainer: Trainer, signum: signal.Signals) -> None:
    """Send a signal to the ranks that this process launched, if any, and ignore how they end (Lightning 2.6.6).

    Otherwise, a thread of Lightning kills this process when a rank that it launched as a subprocess fails.
    """
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signum)
    if isinstance(launcher, _SubprocessScriptLauncher):
        for process in launcher.procs:
            process.returncode = 0


def kill_launched_ranks(trainer: Trainer, seconds: float) -> None:
    """Kill the ranks that this process launched as subprocesses, if any (Lightning 2.6.6).

    Args:
        trainer: The Trainer.
        seconds: Seconds to wait for the ranks to end by themselves.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in launcher.procs):
            time.sleep(0.1)
        launcher.kill(signal.SIGKILL)


def current_datamodule(trainer: Trainer) -> LightningDataModule | None:
    """Return the datamodule of the current run; None if it has plain dataloaders (Lightning 2.6.6).

    With plain dataloaders, ``trainer.datamodule`` may be that of an earlier run.
    """
    selector = trainer._data_connector._datahook_selector
    return selector.datamodule if selector else None


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the Trainer that a module is attached to; ``module.trainer`` raises if there is none (Lightning 2.6.6)."""
    trainer: Trainer | None = module._trainer
    return trainer


def logs_this_step(trainer: Trainer) -> bool:
    """Return whether loggers get the metrics of the current training step (Lightning 2.6.6)."""
    return trainer._logger_connector.should_update_logs


def shard_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Set the data parallel size to the number of ranks instead of nodes (Lightning 2.6.6).

    Call it before ``setup_environment``, which creates the device mesh. The number of ranks is unknown in ``__init__``.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def synchronise_batch_norm(strategy: ModelParallelStrategy, module: LightningModule) -> None:
    """Synchronise batch normalisation if the Trainer has ``sync_batchnorm`` (Lightning 2.6.6)."""
    if strategy._layer_sync is not None:
        strategy._layer_sync.apply(module)


class CheckpointHooks(ModelCheckpoint, ABC):
    """ModelCheckpoint with public names for the private methods that are overridden or called (Lightning 2.6.6).

    It is abstract, so jsonargparse does not list it.
    """

    @abstractmethod
    def after_write(self, trainer: Trainer, filepath: str) -> None:
        """Run after a checkpoint is written, on all ranks; a hook for subclasses.

        Args:
            trainer: The Trainer.
            filepath: Path or URL of the checkpoint.
        """

    def write_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write a checkpoint. Call it on all ranks."""
        self._save_checkpoint(trainer, filepath)

    def is_written(self, trainer: Trainer) -> bool:
        """Return whether the current step has a checkpoint."""
        return self._last_global_step_saved == trainer.global_step

    def skips_writing(self, trainer: Trainer) -> bool:
        """Return whether no checkpoint is due, because it is written already or the Trainer does not train."""
        return self._should_skip_saving_checkpoint(trainer)

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.after_write(trainer, filepath)


class ClosedFormLR(LRScheduler, ABC):
    """LRScheduler with public names for two of its private members (torch 2.6 and 2.14).

    It is abstract, so jsonargparse does not list it.
    """

    @abstractmethod
    def get_closed_form_lr(self) -> list[Any]:
        """Compute the learning rate of each parameter group from its initial value.

        ``step(epoch)`` uses it. SequentialLR calls ``step(epoch)`` when it switches to a scheduler.
        """

    def set_last_lr(self, learning_rates: list[Any]) -> None:
        """Set the result of ``get_last_lr``."""
        self._last_lr = learning_rates

    def _get_closed_form_lr(self) -> list[Any]:
        return self.get_closed_form_lr()


def schedulers_in(scheduler: Any) -> list[Any]:
    """Return the schedulers of a ChainedScheduler; for another scheduler, itself (torch 2.6 and 2.14)."""
    return list(scheduler._schedulers) if isinstance(scheduler, ChainedScheduler) else [scheduler]


def assert_on_device(condition: Tensor) -> None:
    """Fail if a condition is false, without synchronising the device (torch 2.6 and 2.14)."""
    torch._assert_async(condition)


def disable_default_hp_metric(logger: TensorBoardLogger) -> None:
    """Disable the logger's ``hp_metric``, which would stay at -1 (Lightning 2.6.6)."""
    logger._default_hp_metric = False


def add_summary(logger: TensorBoardLogger, summary: Any) -> None:
    """Write a summary to the event file of a logger (torch 2.6 and 2.14)."""
    logger.experiment._get_file_writer().add_summary(summary)


@rank_zero_only
def log_scalars(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log scalars at the step of the training metrics, without the 0.3 ms of ``pl_module.log`` (Lightning 2.6.6)."""
    for logger in trainer.loggers:
        _log_scalars(logger, values, trainer.fit_loop.epoch_loop._batches_that_stepped)


def _log_scalars(logger: Logger, values: Mapping[str, float], step: int) -> None:
    """Log scalars; for a TensorBoardLogger in one event, because an event takes about 0.3 ms."""
    if not isinstance(logger, TensorBoardLogger) or type(logger).log_metrics != TensorBoardLogger.log_metrics:
        logger.log_metrics(dict(values), step)
        return
    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
    scalars = [Summary.Value(tag=prefix + tag, simple_value=value) for tag, value in values.items()]
    logger.experiment._get_file_writer().add_summary(Summary(value=scalars), step)


def epoch_progress(checkpoint: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return the epoch counts in a Trainer's checkpoint, which may be changed in place (Lightning 2.6.6)."""
    progress: dict[str, dict[str, int]] = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    return progress


def end_workers(batches: Iterator[Any]) -> None:
    """End the workers of a DataLoader's iterator, if it has any (torch 2.6 and 2.14).

    Otherwise they run as long as the iterator is referenced, by the traceback of an error, for example.
    """
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
