"""The commands ``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with the configs of this package."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, set_loader
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

# a config can name the classes of these modules without their path
from . import datamodules, lr_schedulers, modules, schedules  # noqa: F401
from .atomic import write_text
from .callbacks import (
    BestCheckpoint,
    Dashboard,
    ExactResume,
    ExitOnSignals,
    LastCheckpoint,
    MarginMonitor,
    Predictions,
    RunProgress,
)
from .callbacks.best_checkpoint import model_checkpoints
from .callbacks.resume import check_seed
from .checkpoints import local_file, read, saved_data_spec
from .compat import CommandLine, kill_launched_ranks, trains_in_other_processes
from .config_files import ConfigParser, expand_paths, flat, load_bounded_yaml
from .dashboard.observer import head_of, tensorboard_loggers
from .datamodules import PredictFolderDataModule
from .errors import InputError, LSoftmaxError, SettingsError
from .library_messages import USED_FOLDER_WARNING, USED_LOG_WARNING
from .run_folder import (
    RunFolders,
    evaluation_logger,
    is_run_folder,
    locked_checkpoints,
    locked_run,
    remove_leftovers,
    report_changed_settings,
    run_of,
    training_logger,
    write_results,
)
from .screen import print_metrics, quiet_logs
from .settings import (
    apply_root,
    as_list,
    check_monitor,
    check_writer,
    checkpoint_mode,
    expand_backbone,
    is_kind,
    reads_files,
)
from .signals import mark_launcher
from .strategies import ClassShardedStrategy
from .user_errors import errors_of_settings

_RANK_SECONDS = 5  # for other ranks to print their own error


class _SaveConfig(SaveConfigCallback):
    """Write the config of a training run atomically; the test after it does not write it again."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, **kwargs)
        self._text = parser.dump(config, skip_none=False, skip_validation=True)  # parsing validated it

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the parser, which does not pickle."""
        return self.__dict__ | {"parser": None, "config": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.loggers:  # without a logger, the run has no folder
            return
        folder = str(trainer.log_dir)  # a collective: every rank must read it
        if not trainer.is_global_zero:
            return
        if "://" in folder:
            files = get_filesystem(folder)
            files.makedirs(folder, exist_ok=True)
            files.write_text(f"{folder}/{self.config_filename}", self._text, encoding="utf-8")
        else:
            write_text(Path(folder, self.config_filename), self._text)


class LSoftmaxCLI(CommandLine):
    """LightningCLI with names of shipped configs, arguments linked from data to model, and a test after ``fit``.

    It accepts any LightningModule and LightningDataModule by its ``class_path``.

    Args:
        args: The arguments. Default: those of the process.
        callbacks: Callbacks of the Trainer, in addition to those of the config.
    """

    def __init__(self, args: list[str] | None = None, callbacks: Sequence[Callback] = ()) -> None:
        set_loader("yaml", load_bounded_yaml, (yaml.YAMLError,))
        StrategyRegistry.register("class_sharded", ClassShardedStrategy, override=True)
        mark_launcher()
        self._callbacks = callbacks
        self._resources = ExitStack()  # the lock of the run folder, and a downloaded checkpoint
        with quiet_logs(), self._resources, self._end_launched_ranks():
            self._parse_and_run(args)

    def _parse_and_run(self, args: list[str] | None) -> None:
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "runs", "name": "", "default_hp_metric": False},
                },
                # not save_last of BestCheckpoint, which would write only checkpoints that are among the best
                "callbacks": [
                    LastCheckpoint(),
                    ExitOnSignals(),
                    MarginMonitor(),
                    ExactResume(),
                    *self._callbacks,
                ],
                "plugins": {"class_path": "lsoftmax_lightning.checkpoints.AtomicCheckpointIO"},
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=ConfigParser,
            parser_kwargs={
                "prog": "lsoftmax_lightning",
                "usage": "lsoftmax_lightning",
                "version": version("lsoftmax-lightning"),
                "description": "Large-Margin Softmax (Liu et al., ICML 2016). `configs` lists the shipped configs, "
                "`compare` compares margins, `export` writes ONNX. Start with: fit --config digits.yaml",
                **{
                    command: {"usage": f"lsoftmax_lightning {command} --config NAME [--KEY VALUE ...]"}
                    for command in self.subcommands()
                },
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add arguments of checkpoint and dashboard; link ``num_classes`` and ``image_shape`` from data to model."""
        for name in ("num_classes", "image_shape"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/acc",
                "checkpoint.mode": "auto",
                "checkpoint.filename": "best",
            }
        )

    @override
    def add_command_arguments(self, parser: LightningArgumentParser, command: str) -> None:
        if command == "predict":
            parser.add_lightning_class_args(Predictions, "predictions")

    def before_instantiate_classes(self) -> None:
        """Expand paths, resolve ``checkpoint.mode: auto``, and replace data that a prediction does not need."""
        settings = self.config[self.subcommand]
        expand_paths(settings)
        apply_root(settings.trainer)
        expand_backbone(settings.model)
        if self.subcommand == "fit" and not self._callbacks:
            check_monitor(settings)
            checkpoint = settings.checkpoint
            if checkpoint.monitor and checkpoint.filename == "last" and not checkpoint.dirpath:
                raise InputError(
                    "checkpoint.filename: must not be last, the name of the last checkpoint, which would replace the "
                    "best one; choose another."
                )
        settings.checkpoint.mode = checkpoint_mode(settings.checkpoint.monitor, settings.checkpoint.mode)
        if self.subcommand == "predict" and settings.ckpt_path and self.skips_data_set(settings.data):
            self._replace_data(settings)

    def skips_data_set(self, data: Any) -> bool:
        """Return whether ``predict`` does not need the files of a datamodule with these settings."""
        return reads_files(data) and data.init_args.predict_folder is not None

    def _replace_data(self, settings: Namespace) -> None:
        """Replace the datamodule, whose images may be absent, by one with the class names of the checkpoint."""
        if settings.ckpt_path in ("last", "best"):
            folders = self._run_folders(settings.ckpt_path)
            settings.ckpt_path = str(folders.checkpoint(folders.find()))
        elif "://" in settings.ckpt_path:
            settings.ckpt_path = str(self._resources.enter_context(local_file(settings.ckpt_path)))
        spec = saved_data_spec(read(settings.ckpt_path))
        if spec is None or not spec.class_names:  # from an earlier release, or a datamodule without names
            return
        of_images = ("predict_folder", "image_size", "mean", "std", "skip_unreadable")
        of_loading = ("batch_size", "num_workers", "memory_gib", "device_memory_gib")
        arguments = {name: settings.data.init_args[name] for name in (*of_images, *of_loading)}
        settings.data.class_path = f"{PredictFolderDataModule.__module__}.{PredictFolderDataModule.__name__}"
        settings.data.init_args = Namespace(checkpoint=settings.ckpt_path, **arguments)  # type: ignore[no-untyped-call]

    def instantiate_classes(self) -> None:
        """Instantiate the classes; turn the error of a constructor into an error of its settings."""
        with errors_of_settings():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Instantiate the Trainer, with the checkpoint to resume from and without disabled checkpoint callbacks.

        Raises:
            InputError: If a setting of the Trainer or the checkpoint is invalid.
        """
        run = self.config_init[self.subcommand]
        if run.trainer.enable_checkpointing is False:
            self.command_parser.callback_keys.remove("checkpoint")
            callbacks = self.trainer_defaults["callbacks"]
            callbacks[:] = [callback for callback in callbacks if not isinstance(callback, LastCheckpoint)]
        check_writer(self.config[self.subcommand].trainer.logger)
        if run.get("weights_only") is False:
            raise InputError("weights_only: checkpoints are always read without running code, got false; remove it.")
        loggers = as_list(run.trainer.logger)
        if self.subcommand == "fit":
            self._name_folders(loggers)
        if run.ckpt_path in ("last", "best"):
            loggers = self._resume_last_run(run.ckpt_path, loggers)
        elif run.ckpt_path and "://" in run.ckpt_path:
            run.ckpt_path = str(self._resources.enter_context(local_file(run.ckpt_path)))
        elif self.subcommand == "fit" and loggers and (folder := run_of(run.ckpt_path)) is not None:
            folders = [Path(str(logger.log_dir)).resolve() for logger in loggers if hasattr(logger, "log_dir")]
            continues = any(each.is_relative_to(folder.resolve()) for each in folders)
            report_changed_settings(folder / "config.yaml", flat(self.settings()), continues)
        if self.subcommand != "fit":
            self._name_folders(loggers)  # within that of the checkpoint, which is now known
        if isinstance(run.trainer.logger, list):  # the first logger names the folder of the run
            kwargs["logger"] = sorted(loggers, key=lambda logger: not isinstance(logger, TensorBoardLogger))
        elif isinstance(run.trainer.logger, TensorBoardLogger):
            kwargs["logger"] = loggers
        if run.trainer.enable_model_summary is None:  # Lightning's summary lists the metrics as layers
            kwargs["enable_model_summary"] = False
        has_progress_bar = any(isinstance(callback, ProgressBar) for callback in as_list(run.trainer.callbacks))
        if run.trainer.enable_progress_bar is not False and not has_progress_bar:
            self.trainer_defaults["callbacks"].append(RunProgress())
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.accumulate_grad_batches < 1:  # Lightning divides by it
            raise InputError(
                f"accumulate_grad_batches: must be at least 1, got {trainer.accumulate_grad_batches}; raise it."
            )
        return trainer

    def _resume_last_run(self, word: str, loggers: list[Any]) -> list[Any]:
        """Replace ``--ckpt_path last`` or ``best`` by a checkpoint of the last run of ``fit``.

        Args:
            word: ``last`` or ``best``.
            loggers: The loggers of this command.

        Returns:
            The loggers for the Trainer. With ``fit --ckpt_path last``, one of them continues in the folder of the run.
        """
        folders = self._run_folders(word)
        settings = flat(self.settings()) if self.subcommand == "fit" and word == "last" else None
        folder = folders.find(settings)
        path = folders.checkpoint(folder)
        if not path.is_file() and settings is None:
            raise InputError(
                f"--ckpt_path {word}: needs a checkpoint of a run of fit, got no {path}; train, or give a file."
            )
        self.config_init[self.subcommand].ckpt_path = str(path) if path.is_file() else None
        self.config[self.subcommand].ckpt_path = None  # the saved config must be able to repeat the run
        if not path.is_file():
            rank_zero_warn(f"There is no {path} to resume from; starting a new run.")
            remove_leftovers(folder)
        elif settings is not None:
            report_changed_settings(folders.config(folder), settings, continues=True)
            # Lightning warns of a checkpoint folder that is not empty, as it is here
            warnings.filterwarnings("ignore", USED_FOLDER_WARNING)
            resumed = folders.resumed_logger(folder, read(path)["global_step"])
            loggers[folders.index] = type(loggers[folders.index])(**resumed)
        return loggers

    def _name_folders(self, loggers: list[Any]) -> None:
        """Replace each TensorBoardLogger without a version by one whose folder is named after the run.

        A command other than ``fit`` writes to a folder of its name in that of the run, or among the runs. This also
        applies if the version of the logger names the folder of a run, as the config of that run may do.
        """
        run = self.config_init[self.subcommand]
        margin = getattr(head_of(self.model), "margin", None)
        settings = as_list(self.config[self.subcommand].trainer.logger)
        for index, (logger, before) in enumerate(zip(loggers, settings, strict=True)):
            is_csv = is_kind(before, CSVLogger)
            if not is_csv and not is_kind(before, TensorBoardLogger):
                continue
            has_version = before.init_args.version is not None
            if self.subcommand == "fit":
                if has_version or is_csv:  # a CSVLogger counts its versions
                    continue
                arguments = training_logger(before.init_args, margin, run.seed_everything)
            elif has_version and not is_run_folder(logger.log_dir):
                continue
            elif not is_csv:
                arguments = evaluation_logger(before.init_args, str(self.subcommand), run.ckpt_path)
            elif folder := logger.log_dir if has_version else run_of(run.ckpt_path):
                place = {"save_dir": str(folder), "name": "", "version": self.subcommand}
                arguments = before.init_args.as_dict() | place
                warnings.filterwarnings("ignore", USED_LOG_WARNING)  # like results.json, the file is replaced
            else:
                continue
            loggers[index] = type(logger)(**arguments)

    def _run_folders(self, word: str) -> RunFolders:
        settings = self.config[self.subcommand]
        return RunFolders(as_list(settings.trainer.logger), word, settings.checkpoint.dirpath)

    def settings(self) -> dict[str, Any]:
        """Return all settings of the command, as in the config of its run."""
        text = self.command_parser.dump(self.config[self.subcommand], skip_none=False)
        settings: dict[str, Any] = yaml.safe_load(text)
        return settings

    def after_instantiate_classes(self) -> None:
        """Reject a checkpoint that is missing, or of other data, another network or another seed.

        Warn if its margin differs.

        Raises:
            InputError: In these cases.
        """
        path = self.config_init[self.subcommand].ckpt_path
        if not path or path.startswith("registry"):
            return
        checkpoint = read(path)
        if "pytorch-lightning_version" not in checkpoint:
            raise InputError(f"--ckpt_path: {path} contains only weights; use --model.warm_start {path}.")
        if self.subcommand == "fit":
            check_seed(checkpoint)
            self._check_length(checkpoint["epoch"])
        spec = saved_data_spec(checkpoint)
        if spec is not None and isinstance(self.model, modules.LSoftmaxModule):
            self.model.data_spec = spec
            self.model.check_data(self.datamodule, training=self.subcommand == "fit")
        weights = {name: w for name, w in checkpoint["state_dict"].items() if isinstance(w, Tensor)}
        saved = {name: tuple(weight.shape) for name, weight in weights.items()}
        expected = {
            name: saved.get(name) if is_lazy(weight) else tuple(weight.shape)
            for name, weight in self.model.state_dict(keep_vars=True).items()
            if isinstance(weight, Tensor)  # not the extra state of a module
        }
        for name in [*saved, *expected]:
            if saved.get(name) != expected.get(name):
                raise InputError(
                    f"--ckpt_path: {path} is from another network: {name} must be {expected.get(name, 'missing')}, got "
                    f"{saved.get(name, 'missing')}; use the config of its run, beside its checkpoints folder."
                )
        self._warn_of_another_margin(path, checkpoint.get("hyper_parameters", {}).get("margin"))

    def _check_length(self, epoch: int) -> None:
        """Reject a run that is shorter than the checkpoint to resume from, before its config is written."""
        max_epochs = self.trainer.max_epochs
        if max_epochs is not None and -1 < max_epochs < epoch:
            raise InputError(
                f"trainer.max_epochs: must be at least the {epoch} epochs of the checkpoint, got {max_epochs}."
            )

    def _warn_of_another_margin(self, path: str, saved: Any) -> None:
        """Warn if the margin differs from that of the checkpoint."""
        margin = getattr(head_of(self.model), "margin", None)
        if margin is None or saved in (None, margin) or self.subcommand == "predict":
            return
        rank_zero_warn(
            f"model.margin: is {saved} in {path}, got {margin}; losses and plots with the margin use {margin}. Set "
            f"--model.margin {saved} to use that of the checkpoint."
        )

    def before_fit(self) -> None:
        """Log the criterion of the best checkpoint, and lock the folder of the run.

        Raises:
            InputError: If the folder contains another run.
        """
        trainer, run = self.trainer, self.config_init[self.subcommand]
        if run.checkpoint.monitor and trainer.checkpoint_callbacks:
            highest = run.checkpoint.mode == "max"
            rank_zero_info(f"Best checkpoint: {'highest' if highest else 'lowest'} {run.checkpoint.monitor}")
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad and not is_lazy(p))
        rank_zero_info(f"Network: {trained:,} trainable parameters")
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        default = None if trainer.loggers else f"{trainer.default_root_dir}/checkpoints"
        kept = [each for each in model_checkpoints(trainer) if isinstance(each, BestCheckpoint | LastCheckpoint)]
        folders = [str(folder) for each in kept if (folder := each.dirpath or default)]
        log_dir, sub_dir = (getattr(next(iter(trainer.loggers), None), name, None) for name in ("log_dir", "sub_dir"))
        if log_dir and "://" not in log_dir:
            folder = Path(log_dir.removesuffix(sub_dir or ""))
            self._resources.enter_context(locked_run(folder, log_dir, run.ckpt_path))
            folders = [each for each in folders if not Path(each).resolve().is_relative_to(folder.resolve())]
        self._resources.enter_context(locked_checkpoints(folders, run.ckpt_path))
        warnings.filterwarnings("ignore", USED_FOLDER_WARNING)  # the folder may contain the lock

    @contextmanager
    def _end_launched_ranks(self) -> Iterator[None]:
        """End the ranks that Lightning launched after an error in this process, for which they might wait forever."""
        try:
            yield
        except Exception:
            if hasattr(self, "trainer"):
                kill_launched_ranks(self.trainer, _RANK_SECONDS)
            raise

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, without Lightning's warning about arguments passed from Python.

        Raises:
            SettingsError: If a setting is invalid.
        """
        try:
            with errors_of_settings():
                self.config = parser.parse_args(args)
        except LSoftmaxError as error:
            raise SettingsError(self._mistake(args) or str(error)) from error
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= (seed or 0) < 2**32:
            raise InputError(f"seed_everything: must be from 0 to {2**32 - 1}, got {seed}; use 0.")

    def _mistake(self, args: Any) -> str | None:
        """Return the message of :func:`~lsoftmax_lightning.mistakes.find_mistake`."""
        from .mistakes import find_mistake

        words = sys.argv[1:] if args is None else args
        return find_mistake(self.command_parsers, words)

    def after_fit(self) -> None:
        """Test the best checkpoint."""
        run = self.config_init[self.subcommand]
        checkpoint: Any = run.checkpoint
        if checkpoint not in self.trainer.checkpoint_callbacks:  # trainer.enable_checkpointing is false
            checkpoint = None
        if checkpoint and trains_in_other_processes(self.trainer):
            checkpoint.restore_best(self.trainer)
            self.trainer.callback_metrics.clear()  # metrics of the training
        best = checkpoint.best_model_path if checkpoint else ""
        chosen_by = {}
        if not Path(best).is_file():
            expected = checkpoint and checkpoint.monitor and not run.trainer.fast_dev_run
            report = rank_zero_warn if expected else rank_zero_info
            report("There is no best checkpoint; testing the model with its last weights.")
            best = None
        elif checkpoint.monitor and checkpoint.best_model_score is not None:
            chosen_by = {checkpoint.monitor: checkpoint.best_model_score}
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
        tested = "model" if best is None else "best checkpoint" if checkpoint.monitor else "last checkpoint"
        chosen = "".join(f", chosen by {name} {value:.4g}" for name, value in chosen_by.items())
        self._report_test(f"Test of the {tested}{chosen}", chosen_by)
        if best:
            rank_zero_info(f"Tested checkpoint: {best}")
        if loggers := tensorboard_loggers(self.trainer):
            rank_zero_info(f"Dashboard: tensorboard --logdir {loggers[0].save_dir}")

    def validate(self, verbose: bool = True, **kwargs: Any) -> None:
        """Evaluate the model on the validation set, and print the metrics if ``verbose``."""
        self.trainer.validate(verbose=False, **kwargs)
        if verbose:
            print_metrics(self.trainer.callback_metrics, "Validation")

    def test(self, verbose: bool = True, **kwargs: Any) -> None:
        """Evaluate the model on the test set, write the metrics to ``results.json``, and print them if ``verbose``."""
        self.trainer.test(verbose=False, **kwargs)
        self._report_test("Test" if verbose else "", {})

    def _report_test(self, title: str, chosen_by: Mapping[str, Any]) -> None:
        """Write the metrics, then print them, because printing fails on a closed pipe or a full disk."""
        folder = write_results(self.trainer, chosen_by)
        if title:
            print_metrics(self.trainer.callback_metrics, title)
        if folder is not None:
            rank_zero_info(f"Run folder: {folder}")

    def predict(self, **kwargs: Any) -> None:
        """Predict, and discard the results, which :class:`~lsoftmax_lightning.callbacks.Predictions` writes."""
        self.trainer.predict(**kwargs | {"return_predictions": False})

    def before_validate(self) -> None:
        """Warn about random weights if ``--ckpt_path`` is not set."""
        if not self.config_init[self.subcommand].ckpt_path:
            rank_zero_warn("No --ckpt_path is set, so these are results of RANDOM weights.")

    before_test = before_predict = before_validate


class InstantiatedCLI(LSoftmaxCLI):
    """Model, data and Trainer of a command without running it.

    The model has the weights and the margin of ``--ckpt_path``, if set.
    """

    @override
    def skips_data_set(self, data: Any) -> bool:
        return reads_files(data)

    @override
    def run_command(self) -> None:
        path = self.config_init[self.subcommand].ckpt_path
        if path:
            checkpoint = read(path)
            self.model.load_state_dict(checkpoint["state_dict"])
            margin = checkpoint.get("hyper_parameters", {}).get("margin")
            if isinstance(self.model, modules.LSoftmaxModule) and isinstance(margin, int):
                self.model.head.margin = margin
