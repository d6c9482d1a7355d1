"""Which runs make a comparison, checked before the first of them is trained."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_warn

from ..atomic import write_text
from ..errors import InputError
from ..functional import check_margin
from ..lightning_cli import LSoftmaxCLI, flat, read_yaml
from .results import damaged_config, damaged_outcome, read_outcome
from .text import file_name, format_argument

# what a comparison says itself
_PLACES = ("trainer.logger", "trainer.default_root_dir", "checkpoint.dirpath")
_OURS = ("model.margin", "seed_everything", "ckpt_path", *_PLACES)


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
        return read_outcome(self.folder) is not None

    def write_config(self) -> None:
        """Writes the settings, for ``fit --config``."""
        write_text(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def check(self, present: Mapping[Path, tuple[Mapping[str, Any], Collection[str]]]) -> None:
        """Sees to it that what the folder of the comparison holds is of this comparison.

        Args:
            present: What :func:`_present` has found there.

        Raises:
            InputError: If the run was made with other settings, or runs beside it differ in what is not compared.
        """
        if damaged := damaged_outcome(self.folder):
            rank_zero_warn(f"{damaged} is missing or damaged; its run is not taken for finished.")
        now = flat(self.config)
        for folder, (before, point) in present.items():
            compared = set(_OURS)
            if folder != self.folder:
                if not point:
                    continue
                compared |= {*self.point, *point}
            elif not self.finished:  # it goes on with the checkpoints that are where they were
                compared -= set(_PLACES)
                if _is_cut(before, now):  # by a release that did not write the file at once
                    rank_zero_warn(
                        f"{folder / 'config.yaml'} is incomplete and is written anew; checkpoints in {folder} are kept."
                    )
                    before = dict(list(before.items())[:-1])
                    compared |= now.keys() - before.keys()
            for key in {**now, **before}:
                there, here = before.get(key, "nothing"), now.get(key, "nothing")
                if there != here and not _of(key, compared):
                    raise InputError(
                        f"{folder} is of a run with other settings: {key} is {there} there and {here} here. Give "
                        "this comparison a --folder of its own, or remove that run."
                    )


def _present(folder: Path) -> dict[Path, tuple[Mapping[str, Any], Collection[str]]]:
    """Of each run that lies in a folder, its settings and, if it is finished, the names of its point."""
    found: dict[Path, tuple[Mapping[str, Any], Collection[str]]] = {}
    for run in sorted({path.parent for name in ("config.yaml", "run.json") for path in folder.glob(f"*/{name}")}):
        settings = read_yaml(run / "config.yaml")
        outcome = read_outcome(run)
        if outcome is not None and settings is None:
            raise damaged_config(run / "config.yaml")
        found[run] = flat(settings) if settings else {}, outcome[0]["point"] if outcome else ()
    return found


def _is_cut(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether ``before`` may be the beginning of settings like ``now``; the last value may be cut, too."""
    names = list(before)
    return names[:-1] == list(now)[: len(names[:-1])] and (
        len(before) < len(now) or before[names[-1]] != now.get(names[-1])
    )


def _of(key: str, settings: Collection[str]) -> bool:
    """Whether a setting is one of these, or a part of one."""
    return any(key == setting or key.startswith(f"{setting}.") for setting in settings)


class _Check(LSoftmaxCLI):
    """Makes everything that ``fit`` would use, and does not train."""

    def before_fit(self) -> None:
        """Do not lock the folder of a run."""

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
    for margin in margins:
        check_margin(margin)
    if min(seeds) < 0:
        raise InputError(f"seeds count from 0, got {min(seeds)}.")
    if max(seeds) >= 2**32:
        raise InputError(f"seeds: must be from 0 to {2**32 - 1}, got {max(seeds)}.")
    words = [word.removeprefix("--").partition("=")[0] for word in settings if word.startswith("--")]
    for name in [*words, *sweep]:
        if _of(name.replace(".init_args", ""), _OURS):
            raise InputError(f"{name} cannot be set: a comparison says it by --margins, --seeds and --folder.")
    points: list[dict[str, Any]] = [
        {"margin": margin} | dict(zip(sweep, values, strict=True))
        for margin, *values in itertools.product(margins, *sweep.values())
    ]
    planned: list[Run] = []
    prepared: list[Any] = []
    for point in points:
        name = file_name("-".join([f"m{point['margin']}", *(f"{key.split('.')[-1]}={point[key]}" for key in sweep)]))
        # all that says where a run is left, over what a config says of it
        place = {"save_dir": str(folder), "name": name, "version": "", "sub_dir": None, "prefix": ""}
        logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": place | {"default_hp_metric": False},
        }
        args = [f"--config={config}" for config in configs] + list(settings)
        args += [f"--{key}={format_argument(point[key])}" for key in sweep]
        with _quiet_lightning():
            args += [f"--model.margin={point['margin']}", f"--trainer.logger={json.dumps(logger)}"]
            cli = _Check(["fit", *args, "--trainer.default_root_dir=null"])
            if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise InputError("a fast_dev_run leaves nothing to compare; take --trainer.max_steps instead.")
            made = cli.settings()
            if made["data"] not in prepared:  # here, so that no two runs do it at once
                cli.datamodule.prepare_data()
                prepared.append(made["data"])
        for seed in seeds:
            config = copy.deepcopy(made) | {"seed_everything": seed}
            run_name = f"{name}-s{seed}"
            config["trainer"]["logger"]["init_args"]["name"] = run_name
            planned.append(Run(folder / run_name, {**point, "seed": seed}, config))
    alike = [{key: value for key, value in flat(run.config).items() if not _of(key, _PLACES)} for run in planned]
    if min(len({run.folder for run in planned}), len(set(map(repr, alike)))) < len(planned):
        raise InputError(f"two runs would have the same name: {', '.join(sorted(run.folder.name for run in planned))}.")
    present = _present(folder)
    for run in planned:
        run.check(present)
    return sorted(planned, key=lambda run: seeds.index(run.point["seed"]))


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without what Lightning says of devices and seeds, once for each setting."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
