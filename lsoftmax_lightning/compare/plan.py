"""Which runs make a comparison, checked before the first of them is trained."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..lightning_cli import LSoftmaxCLI

_OURS = ("model.margin", "seed_everything", "trainer.logger", "trainer.default_root_dir")


@dataclass(frozen=True, eq=False)
class Run:
    """A training to be done, or done already.

    Attributes:
        folder: Where all of it is left.
        point: What tells it from the others: ``margin``, ``seed`` and, by their names, the swept settings.
        config: All settings, as ``fit --config`` takes them.
    """

    folder: Path
    point: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether it was trained and tested."""
        return (self.folder / "run.json").is_file()

    def write_config(self) -> None:
        """Writes the settings, for ``fit --config``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))

    def check(self) -> None:
        """Sees to it that the folder is of this run, if there is one.

        Raises:
            InputError: If it holds a run of other settings.
        """
        path = self.folder / "config.yaml"
        if not path.is_file():
            return
        before, now = _flat(yaml.safe_load(path.read_text())), _flat(self.config)
        for key in {**now, **before}:
            there, here = before.get(key, "nothing"), now.get(key, "nothing")
            # where the checkpoint and the folder are is no setting of the training
            if there != here and key != "ckpt_path" and not key.startswith("trainer.logger."):
                raise InputError(
                    f"{self.folder} is of a run with other settings: {key} is {there} there and {here} here. Give this "
                    "comparison a --folder of its own, or remove that run."
                )


def _flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Settings by their full names."""
    if not isinstance(settings, dict) or not settings:
        return {path: settings}
    parts = (_flat(value, f"{path}.{key}" if path else str(key)) for key, value in settings.items())
    return {name: value for part in parts for name, value in part.items()}


class _Check(LSoftmaxCLI):
    """Makes everything that ``fit`` would use, and does not train."""

    def fit(self, **kwargs: Any) -> None:
        """Nothing."""

    def after_fit(self) -> None:
        """Nothing."""

    def settings(self) -> dict[str, Any]:
        """All settings, as the config of a run has them."""
        text = self._parser("fit").dump(self.config["fit"], skip_none=False)
        settings: dict[str, Any] = yaml.safe_load(text)
        return settings


def plan(
    configs: Sequence[str],
    margins: Sequence[int],
    seeds: Sequence[int],
    settings: Sequence[str],
    sweep: Mapping[str, Sequence[Any]],
    folder: Path,
) -> list[Run]:
    """The runs of a comparison, all of one seed before those of the next.

    Model, data and Trainer are made once for each margin and swept value, and what the data need is downloaded.

    Args:
        configs: Paths, or names of shipped configs; later ones go over earlier ones.
        margins: m of each run.
        seeds: Of each run.
        settings: Further arguments of ``fit``.
        sweep: Further settings by name, and their values.
        folder: Where the runs are left.

    Raises:
        InputError: If there is nothing to compare, a setting is not to be had, or the folder holds other runs.
        DataError: If data cannot be downloaded.
        SystemExit: If the command line does not know a setting; what is wrong is printed.
    """
    for name, values in {"margins": margins, "seeds": seeds, **sweep}.items():
        if not values or len({str(value) for value in values}) < len(values):
            raise InputError(f"{name} takes one value or more, no two the same, got {list(values)}.")
    for name in [word.removeprefix("--").partition("=")[0] for word in settings if word.startswith("--")] + list(sweep):
        if name.startswith(_OURS):
            raise InputError(f"{name} cannot be set: in a comparison --margins, --seeds and --folder say it.")
    points: list[dict[str, Any]] = [
        {"margin": margin} | dict(zip(sweep, values, strict=True))
        for margin, *values in itertools.product(margins, *sweep.values())
    ]
    planned: list[Run] = []
    for point in points:
        name = "-".join([f"m{point['margin']}", *(f"{key.split('.')[-1]}={_plain(point[key])}" for key in sweep)])
        logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": str(folder), "name": name, "version": "", "default_hp_metric": False},
        }
        args = [f"--config={config}" for config in configs] + list(settings)
        args += [f"--{key}={json.dumps(point[key])}" for key in sweep]
        with _quiet_lightning():
            cli = _Check(["fit", *args, f"--model.margin={point['margin']}", f"--trainer.logger={json.dumps(logger)}"])
            if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise InputError("a fast_dev_run leaves nothing to compare; take --trainer.max_steps instead.")
            if not planned:  # here, so that no two runs do it at once
                cli.datamodule.prepare_data()
        for seed in seeds:
            config = cli.settings() | {"seed_everything": seed}
            run_name = f"{name}-s{seed}"
            config["trainer"]["logger"]["init_args"]["name"] = run_name
            planned.append(Run(folder / run_name, {**point, "seed": seed}, config))
    if len({run.folder for run in planned}) < len(planned):
        raise InputError(f"no two settings to sweep may end in the same name, got {', '.join(sweep)}.")
    for run in planned:
        run.check()
    return sorted(planned, key=lambda run: seeds.index(run.point["seed"]))


def _plain(value: Any) -> str:
    """A value as a part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in str(value))


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without what Lightning says of devices and seeds, once for each setting."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
