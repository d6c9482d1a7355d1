"""Private parts of Lightning, jsonargparse and torch that this package needs.

Other modules use the public names below. ``tests/test_compat.py`` fails if a library changes what is relied on here. A
version in a docstring is one in which it was seen.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from abc import ABC, abstractmethod
from argparse import Action
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse._typehints import get_all_subclass_paths
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, _InstantiatorFn
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch import Tensor
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from typing_extensions import override

MAX_LISTED_CLASSES = 20


class CommandLine(LightningCLI):
    """LightningCLI with public methods in place of the private ones that are overridden or called (Lightning 2.6.6).

    Models and data take any class. Their optimizers and schedulers copy and pickle: those of jsonargparse hold the
    parser. The settings in the checkpoint of ``--ckpt_path`` do not replace those of the user. If the first argument is
    the command, the parsers of the other commands have no arguments: adding them takes a fifth of the start of a run.

    Args:
        args: Positional arguments of LightningCLI.
        kwargs: Its other arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        words = kwargs.get("args")
        first = (sys.argv[1:] if words is None else words)[:1]
        # options before the command, such as a config file, may have settings of all commands
        self._used_commands = self.subcommands().keys() & first or self.subcommands().keys()
        super().__init__(*args, **kwargs)

    def add_command_arguments(self, parser: LightningArgumentParser, command: str) -> None:
        """Add arguments of a single command to its parser."""

    def run_command(self) -> None:
        """Run the command, with the hooks before and after it."""
        super()._run_subcommand(str(self.subcommand))

    @property
    def command_parsers(self) -> dict[str, LightningArgumentParser]:
        """Parser of each command."""
        return {command: self._parser(command) for command in self.subcommands()}

    @property
    def command_parser(self) -> LightningArgumentParser:
        """Parser of the command."""
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
        if not hasattr(self, "config_dump"):  # once, without the second validation of Lightning's
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
    """Help without long lists of classes, and without the markup of docstrings (jsonargparse 4.40 and 4.53)."""

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
    """Return the partial of a class in place of that of jsonargparse, whose last argument is the class.

    jsonargparse 4.40 and 4.53 create an optimizer or scheduler by a function of its parser.
    """
    if not isinstance(value, partial) or not str(value.func.__module__).startswith("jsonargparse"):
        return value
    return partial(value.args[-1], **{name: plain_partial(setting) for name, setting in value.keywords.items()})


def settings_of_parser(parser: ArgumentParser) -> dict[str, Any]:
    """Return the settings of a parser, with their types, or None for options without one (jsonargparse 4.40 and 4.53).

    For groups there are only the settings in them.
    """
    actions = (action for action in parser._actions if not action.dest.endswith(".help"))
    types = {action.dest: getattr(action, "_typehint", None) for action in actions}
    groups = {name.rpartition(".")[0] for name in types}
    return {name: kind for name, kind in types.items() if name not in groups}


def known_subclasses(kind: type) -> list[str]:
    """Return the import paths of a class and its subclasses that can be created (jsonargparse 4.40 and 4.53)."""
    return get_all_subclass_paths(kind)


def trains_in_other_processes(trainer: Trainer) -> bool:
    """Return whether the ranks are forked or spawned processes, which end with the training (Lightning 2.6.6)."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def kill_launched_ranks(trainer: Trainer, seconds: float) -> None:
    """Kill the ranks that this process launched by commands, if it launched any (Lightning 2.6.6).

    Args:
        trainer: The Trainer.
        seconds: Time for the ranks to end by themselves.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in launcher.procs):
            time.sleep(0.1)
        launcher.kill(signal.SIGKILL)


def current_datamodule(trainer: Trainer) -> LightningDataModule | None:
    """Return the datamodule of the current run, or None if it has plain dataloaders (Lightning 2.6.6).

    ``trainer.datamodule`` is still that of an earlier run then.
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
    """Set the size of data parallelism to the number of ranks, instead of nodes (Lightning 2.6.6).

    Call it before ``setup_environment``, which makes the device mesh; the number is not known to ``__init__``.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def synchronise_batch_norm(strategy: ModelParallelStrategy, module: LightningModule) -> None:
    """Synchronise the batch normalisation, if the Trainer has ``sync_batchnorm`` (Lightning 2.6.6)."""
    if strategy._layer_sync is not None:
        strategy._layer_sync.apply(module)


class CheckpointHooks(ModelCheckpoint, ABC):
    """ModelCheckpoint with public methods in place of the private ones that are overridden or called (Lightning 2.6.6).

    It is abstract, so that jsonargparse does not offer it to users.
    """

    @abstractmethod
    def after_write(self, trainer: Trainer, filepath: str) -> None:
        """Do something after a checkpoint was written. It is called on all ranks.

        Args:
            trainer: The Trainer.
            filepath: Path or URL of the checkpoint.
        """

    def write_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write a checkpoint. Call it on all ranks."""
        self._save_checkpoint(trainer, filepath)

    def is_written(self, trainer: Trainer) -> bool:
        """Return whether the last checkpoint is that of the current step."""
        return self._last_global_step_saved == trainer.global_step

    def skips_writing(self, trainer: Trainer) -> bool:
        """Return whether no checkpoint is due: it is written already, or the Trainer does not train."""
        return self._should_skip_saving_checkpoint(trainer)

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.after_write(trainer, filepath)


class ClosedFormLR(LRScheduler, ABC):
    """A learning rate scheduler with public names for two private parts of LRScheduler (torch 2.6 and 2.14).

    It is abstract, so that jsonargparse does not offer it to users.
    """

    @abstractmethod
    def get_closed_form_lr(self) -> list[Any]:
        """Compute the learning rate of each parameter group from its initial value.

        ``step(epoch)`` uses it, which SequentialLR calls where a scheduler begins.
        """

    def set_last_lr(self, learning_rates: list[Any]) -> None:
        """Set what ``get_last_lr`` returns."""
        self._last_lr = learning_rates

    def _get_closed_form_lr(self) -> list[Any]:
        return self.get_closed_form_lr()


def schedulers_in(scheduler: Any) -> list[Any]:
    """Return the schedulers in a ChainedScheduler, or the scheduler itself (torch 2.6 and 2.14)."""
    return list(scheduler._schedulers) if isinstance(scheduler, ChainedScheduler) else [scheduler]


def assert_on_device(condition: Tensor) -> None:
    """Fail if a condition is false, on an accelerator without waiting for it (torch 2.6 and 2.14)."""
    torch._assert_async(condition)


def disable_default_hp_metric(logger: TensorBoardLogger) -> None:
    """Prevent the logger from logging ``hp_metric``, which would stay -1 (Lightning 2.6.6)."""
    logger._default_hp_metric = False


def add_summary(logger: TensorBoardLogger, summary: Any) -> None:
    """Write a summary to the event file of a logger (torch 2.6 and 2.14)."""
    logger.experiment._get_file_writer().add_summary(summary)


def epoch_progress(checkpoint: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return the counts of epochs in a checkpoint of the Trainer, to be read or changed (Lightning 2.6.6)."""
    progress: dict[str, dict[str, int]] = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    return progress


def end_workers(batches: Iterator[Any]) -> None:
    """End the workers of an iterator of a DataLoader, if it has any (torch 2.6 and 2.14).

    Without this they run for as long as something, such as the traceback of an error, refers to the iterator.
    """
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
