"""``fit``, ``validate``, ``test`` and ``predict`` from YAML: Lightning's command line with our configs."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

# the names that a YAML may use without their path
from . import datamodules, lr_schedulers, modules, schedules  # noqa: F401
from .callbacks import Dashboard, ExactResume, LastCheckpoint, MarginMonitor, Predictions
from .checkpoints import read
from .errors import InputError, LSoftmaxError
from .strategies import ClassShardedStrategy

_PACKAGE = Path(__file__).parent
# In the wheel the configs lie inside the package; in a checkout, beside it.
CONFIGS = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())


def find_config(name: str) -> Path:
    """A config by path, or a shipped one by its bare name.

    Args:
        name: A path, seen from the working directory; or the name of a shipped config, ``.yaml`` or not.

    Raises:
        InputError: If there is neither.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(path.name for path in sorted(CONFIGS.glob("*.yaml")))
    raise InputError(f"no config {name!r} in {Path.cwd()} nor among the shipped ones: {shipped}.")


class _ConfigFile(ActionConfigFile):
    """``--config`` that knows the shipped configs."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, str(find_config(values)), option_string)  # type: ignore[no-untyped-call]


class _Parser(LightningArgumentParser):
    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = _ConfigFile
        return super().add_argument(*args, **kwargs)


class _SaveConfig(SaveConfigCallback):
    """Keeps the config of a training run; testing it later does not write it again."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.loggers:  # without a logger there is no folder of this run
            super().setup(trainer, pl_module, stage)


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Settings by the names that the command line has for them.

    Args:
        settings: As YAML has them.
        path: The name of these among others.
    """
    if not isinstance(settings, dict) or not settings:
        return {path.replace(".init_args", "").removeprefix("."): settings}
    parts = (flat(value, f"{path}.{key}") for key, value in settings.items())
    return {name: value for part in parts for name, value in part.items()}


class LSoftmaxCLI(LightningCLI):
    """Lightning's CLI with our parser: bare config names, data linked to model, a test after fit.

    Any LightningModule and LightningDataModule that can be imported takes part, by its ``class_path``.

    Args:
        args: The arguments, by default those of the process.
        callbacks: For the Trainer, beside those of the config.
    """

    def __init__(self, args: list[str] | None = None, callbacks: Sequence[Callback] = ()) -> None:
        StrategyRegistry.register("class_sharded", ClassShardedStrategy, override=True)
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
                # on its own: `save_last` of the one that monitors would leave out what is not among the best
                "callbacks": [
                    LastCheckpoint(),
                    MarginMonitor(),
                    ExactResume(),
                    *callbacks,
                ],
                "plugins": {"class_path": "lsoftmax_lightning.checkpoints.WholeCheckpointIO"},
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=_Parser,
            parser_kwargs={
                "prog": "lsoftmax_lightning",
                "usage": "lsoftmax_lightning",
                "version": version("lsoftmax-lightning"),
                "description": "Large-Margin Softmax (Liu et al., ICML 2016). `configs` lists the shipped configs, "
                "`compare` sets margins against each other, `export` writes ONNX; start with: fit --config digits.yaml",
                **{
                    command: {"usage": f"lsoftmax_lightning {command} --config NAME [--KEY VALUE ...]"}
                    for command in self.subcommands()
                },
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what the data knows to the model; keeps the best and the last checkpoint; draws the dashboard."""
        for fact in ("num_classes", "image_shape"):
            parser.link_arguments(f"data.{fact}", f"model.init_args.{fact}", apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/acc",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
            }
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_lightning_class_args(Predictions, "predictions")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leaves the config as it is: Lightning would put a checkpoint's settings over those the user gave."""

    def instantiate_classes(self) -> None:
        """As Lightning's; whatever a constructor does not take is a user's mistake."""
        with _taken_as_settings():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As Lightning's, without checkpoints where there are to be none; goes on with a run that was stopped."""
        if self._get(self.config_init, "trainer").enable_checkpointing is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
            del self.trainer_defaults["callbacks"][0]
        word = self.config[self.subcommand].ckpt_path
        if word in ("last", "best"):
            kwargs |= self._take_up(word)
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.accumulate_grad_batches < 1:  # which Lightning divides by
            raise InputError(f"accumulate_grad_batches must be 1 or more, got {trainer.accumulate_grad_batches}.")
        return trainer

    def _take_up(self, word: str) -> dict[str, Any]:
        """Finds what ``--ckpt_path last`` and ``best`` mean: checkpoints of the last run of ``fit``.

        A ``fit`` of the last one goes on in that run's folder: for the Trainer there is a logger that writes there.
        """
        settings, run = self.config[self.subcommand], self.config_init[self.subcommand]
        places, loggers = (x if isinstance(x, list) else [x] for x in (settings.trainer.logger, run.trainer.logger))
        at = next((n for n, logger in enumerate(loggers) if isinstance(logger, TensorBoardLogger)), None)
        if at is None:
            raise InputError(f"--ckpt_path {word} looks in the folders of a TensorBoardLogger; give a file instead.")
        place = places[at].init_args
        runs, version = Path(place.save_dir, place.name or ""), place.version
        if version is None:  # tests and predictions leave no config
            numbers = [path.parent.name.removeprefix("version_") for path in runs.glob("version_*/config.yaml")]
            version = max((int(number) for number in numbers if number.isdecimal()), default=0)
        folder = runs / (version if isinstance(version, str) else f"version_{version}")
        path = folder / "checkpoints" / f"{word}.ckpt"
        go_on = self.subcommand == "fit" and word == "last"
        if not path.is_file() and not go_on:
            raise InputError(f"--ckpt_path {word} is one of the last run of fit, and there is no {path}.")
        run.ckpt_path = str(path) if path.is_file() else None
        settings.ckpt_path = None  # in the config that is saved, which says how to repeat the run
        if not path.is_file():
            rank_zero_warn(f"There is no {path} to go on from: this is a new run.")
        elif go_on:
            self._tell_changes(folder)
            # said by Lightning, rightly, of a folder named twice
            warnings.filterwarnings("ignore", "Checkpoint directory")
            # what was logged beyond the checkpoint is logged again
            again = {"version": version, "purge_step": read(path)["global_step"] + 1}
            loggers[at] = type(loggers[at])(**place.as_dict() | again)
        return {"logger": loggers}

    def _tell_changes(self, folder: Path) -> None:
        """Says which settings are not those that the run began with, and refuses those it cannot go on with."""
        before = flat(yaml.safe_load((folder / "config.yaml").read_text()))
        now = flat(yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_none=False)))
        changed = {name for name in {**before, **now} if before.get(name) != now.get(name)} - {"ckpt_path"}
        for part in ("model.optimizer", "model.lr_scheduler"):
            kind, other = (settings.get(f"{part}.class_path") for settings in (before, now))
            if kind != other:
                raise InputError(
                    f"the run in {folder} has {kind} for its {part} and cannot go on with {other}. Set it back, or "
                    "begin anew without --ckpt_path."
                )
        said = "".join(f"\n  {name} {before.get(name)} -> {now.get(name)}" for name in sorted(changed))
        rank_zero_info(f"Going on with {folder}" + (f", with other settings:{said}" if changed else ""))
        kept = ("model.optimizer.", "model.lr_scheduler.")
        if any(name.startswith(kept) for name in changed - {"model.lr_scheduler.monitor"}):
            rank_zero_warn("Settings of optimizer and lr_scheduler are those of the checkpoint: others have no effect.")

    def after_instantiate_classes(self) -> None:
        """Refuses a checkpoint that is not there or of another network, before any work."""
        path = self.config_init[self.subcommand].ckpt_path
        if not path or "://" in path or path.startswith("registry"):
            return
        checkpoint = read(path)
        if "pytorch-lightning_version" not in checkpoint:
            raise InputError(f"{path} has weights alone: begin with them by --model.warm_start {path}.")
        saved = checkpoint["state_dict"]
        shapes, own = ({name: tuple(w.shape) for name, w in of.items()} for of in (saved, self.model.state_dict()))
        for name in [*shapes, *own]:
            if shapes.get(name) != own.get(name):
                raise InputError(
                    f"{path} is of another network than the config: {name} is {shapes.get(name, 'missing')} there and "
                    f"{own.get(name, 'missing')} here. The config of its run is beside its checkpoints folder."
                )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; unlike Lightning's, without a warning where Python code calls :func:`main` with arguments."""
        with _taken_as_settings():
            self.config = parser.parse_args(args)
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= (seed or 0) < 2**32:
            raise InputError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}.")

    def after_fit(self) -> None:
        """Tests the best checkpoint."""
        checkpoint = self.trainer.checkpoint_callback
        best = getattr(checkpoint, "best_model_path", "")
        chosen_by = {}
        if not Path(best).is_file():
            rank_zero_info("No validation left a best checkpoint; testing the model as it is.")
            best = None
        elif getattr(checkpoint, "monitor", None):
            chosen_by = {checkpoint.monitor: checkpoint.best_model_score}  # type: ignore[union-attr]
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best)
        self._write_results(chosen_by)

    def after_test(self) -> None:
        """Leaves the figures in the run's folder as ``results.json``."""
        self._write_results({})

    def _write_results(self, chosen_by: dict[str, Any]) -> None:
        """Writes the figures of a test, and the one of validation by which its checkpoint was chosen."""
        if self.trainer.fast_dev_run or not self.trainer.loggers:  # type: ignore[attr-defined]
            return
        path = self._run_folder() / "results.json"
        if self.trainer.is_global_zero:
            figures = {name: float(value) for name, value in (self.trainer.callback_metrics | chosen_by).items()}
            path.write_text(json.dumps(figures, indent=2) + "\n")
            rank_zero_info(f"Everything of this run is in {path.parent}")

    def predict(self, **kwargs: Any) -> None:
        """Holds nothing of what is predicted: :class:`~lsoftmax_lightning.callbacks.Predictions` writes it."""
        self.trainer.predict(**kwargs | {"return_predictions": False})

    def _run_folder(self) -> Path:
        folder = Path(str(self.trainer.log_dir))  # to be asked on every process
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def before_validate(self) -> None:
        """Warns where random weights would be scored."""
        # true, and no matter: nothing is saved here
        warnings.filterwarnings("ignore", "The dirpath has changed")
        if not self.config_init[self.subcommand].ckpt_path:
            rank_zero_warn("No --ckpt_path was given: this is the output of RANDOM weights.")

    before_test = before_predict = before_validate


@contextmanager
def _taken_as_settings() -> Iterator[None]:
    """Makes an error of the user's out of whatever a parser or a constructor has against its arguments."""
    try:
        yield
    except Exception as error:
        if _mistake(error) or "JSONARGPARSE_DEBUG" in os.environ:
            raise
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        raise InputError(f"{type(cause).__name__}: {cause} (JSONARGPARSE_DEBUG=1 shows where.)") from error


@contextmanager
def mistakes_in_a_line() -> Iterator[None]:
    """Ends the process with a message and no traceback, for whatever the user can mend.

    Raises:
        SystemExit: With the message printed.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*treespec, LeafSpec")  # Lightning of itself; no user can mend it
            yield
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        # Lightning does so for NCCL alone; gloo's threads, left to the end of the process, now and then abort it
        if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
            # torch 2.6 keeps Python's lock while it waits for them, who may want it to let go of the last tensors
            time.sleep(0.1)
            dist.destroy_process_group()


_MENDABLE = {
    "Expected more than 1 value per channel": "batch normalisation takes 2 images or more a device: raise batch_size.",
    "Kernel size can't be greater than actual input size": "the images are too small for this backbone.",
    "Output size is too small": "the images are too small for this backbone.",
    "SyncBatchNorm layers only work with GPU": "synchronised batch normalisation works on GPUs alone.",
    "gloo/transport/tcp/pair.cc": "another process of the run died; above is its own error, or none if it was killed.",
    "can't allocate memory": "these settings take more memory than there is.",
}
"""What libraries say of settings that do not go together, and what a user can do."""


def _mistake(error: Exception) -> BaseException | str | None:
    """What the user can mend, found in what jsonargparse wraps around the error of a constructor."""
    for said, advice in _MENDABLE.items():
        if said in str(error):
            return advice
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LSoftmaxError | MisconfigurationException | OSError):
            return cause
        if str(cause).startswith("Expected a <class 'NoneType'>"):
            return error  # its older versions chain this in the place of ours, which is in the text alone
        cause = cause.__cause__
    return None
