"""The runs of a comparison, all checked before the first one is trained."""

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
from ..config_files import flat, read_yaml, setting_name
from ..errors import InputError
from ..functional import check_margin
from ..lightning_cli import InstantiatedCLI
from .results import damaged_config, read_facts_and_metrics
from .text import file_name, format_argument

_OUTPUT_KEYS = ("trainer.logger", "trainer.default_root_dir", "checkpoint.dirpath")
_RESERVED_KEYS = ("model.margin", "seed_everything", "ckpt_path", *_OUTPUT_KEYS)  # set by the comparison


@dataclass(frozen=True, eq=False)
class Run:
    """A run of a comparison, finished or not.

    Attributes:
        folder: Folder of its checkpoints, logs and results.
        params: ``margin``, ``seed`` and the swept settings by name, which distinguish it from the other runs.
        config: All settings, in the format of ``fit --config``.
    """

    folder: Path
    params: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether it was trained and tested."""
        return read_facts_and_metrics(self.folder)[0] is not None

    def write_config(self) -> None:
        """Write the settings to ``config.yaml`` in the folder."""
        write_text(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def check(self, existing: Mapping[Path, tuple[Mapping[str, Any], Collection[str]]]) -> None:
        """Check that the runs in the folder of the comparison belong to it.

        Args:
            existing: Runs in the folder, as :func:`_existing_runs` returns them.

        Raises:
            InputError: If this run was trained with other settings, another run differs from it in a setting that is
                not compared, or a file has the name of its folder.
        """
        if self.folder.is_file():
            raise InputError(
                f"--folder: has a file with the name of a run, got {self.folder}; move it or choose another folder."
            )
        finished, damaged = read_facts_and_metrics(self.folder)
        if damaged:
            rank_zero_warn(f"{damaged} is missing or damaged; its run counts as unfinished.")
        expected = flat(self.config)
        for folder, (found, params) in existing.items():
            ignored = set(_RESERVED_KEYS)
            if folder != self.folder:
                if not params:
                    continue
                ignored |= {*self.params, *params}
            elif finished is None:  # it resumes from checkpoints in the folder that these keys set
                ignored -= set(_OUTPUT_KEYS)
                if _is_truncated(found, expected):  # by a release that did not write the file atomically
                    rank_zero_warn(
                        f"{folder / 'config.yaml'} is incomplete and is replaced; checkpoints in {folder} are kept."
                    )
                    found = dict(list(found.items())[:-1])
                    ignored |= expected.keys() - found.keys()
            for key in {**expected, **found}:
                there, here = found.get(key, "not set"), expected.get(key, "not set")
                if there != here and not _is_under(key, ignored):
                    raise InputError(
                        f"--folder: has a run with other settings, got {key} {there} in {folder} and {here} in this "
                        "comparison; choose another folder or remove that run."
                    )


def _existing_runs(folder: Path) -> dict[Path, tuple[Mapping[str, Any], Collection[str]]]:
    """Return the settings of each run in a folder, and the names of its params if it is finished."""
    runs: dict[Path, tuple[Mapping[str, Any], Collection[str]]] = {}
    for run in sorted({path.parent for name in ("config.yaml", "run.json") for path in folder.glob(f"*/{name}")}):
        settings = read_yaml(run / "config.yaml")
        finished, _ = read_facts_and_metrics(run)
        if finished is not None and settings is None:
            raise damaged_config(run / "config.yaml")
        runs[run] = flat(settings) if settings else {}, finished[0]["params"] if finished else ()
    return runs


def _is_truncated(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Return whether settings are a prefix of the expected ones, whose last value may be truncated."""
    names = list(found)
    return names[:-1] == list(expected)[: len(names[:-1])] and (
        len(found) < len(expected) or found[names[-1]] != expected.get(names[-1])
    )


def _is_under(key: str, settings: Collection[str]) -> bool:
    """Return whether a key is one of these settings or below one."""
    return any(key == setting or key.startswith(f"{setting}.") for setting in settings)


def plan(
    configs: Sequence[str],
    margins: Sequence[int],
    seeds: Sequence[int],
    settings: Sequence[str],
    sweep: Mapping[str, Sequence[Any]],
    folder: Path,
) -> list[Run]:
    """Return the runs of a comparison, ordered by seed.

    To check the settings, model, data and Trainer are created once for each margin and combination of swept values, and
    the data are downloaded.

    Args:
        configs: Paths or names of shipped configs; later ones override earlier ones.
        margins: Margins m.
        seeds: Seeds of the training, from 0 to 2**32 - 1.
        settings: Further arguments of ``fit``.
        sweep: Values of further settings by name.
        folder: Folder of the comparison.

    Raises:
        InputError: If there is nothing to compare, a setting is wrong or not available, or the folder contains other
            runs.
        DataError: If data cannot be downloaded.
    """
    for name, values in {"margins": margins, "seeds": seeds, **sweep}.items():
        if not values or len({str(value) for value in values}) < len(values):
            raise InputError(f"{name}: must be one or more distinct values, got {list(values)}; list each value once.")
    for margin in margins:
        check_margin(margin)
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise InputError(f"seeds: must be from 0 to {2**32 - 1}, got {seed}.")
    options = [setting_name(word[2:].partition("=")[0]) for word in settings if word.startswith("--")]
    for name in [*options, *sweep]:
        if _is_under(name, _RESERVED_KEYS):
            raise InputError(
                f"{name}: cannot be set, because the comparison sets it; use --margins, --seeds or --folder."
            )
    for name in sweep:
        if name in options:
            raise InputError(f"{name}: must be fixed or swept, got both; remove one.")
    combinations: list[dict[str, Any]] = [
        {"margin": margin} | dict(zip(sweep, values, strict=True))
        for margin, *values in itertools.product(margins, *sweep.values())
    ]
    runs: list[Run] = []
    prepared: list[Any] = []  # settings of the downloaded data
    for params in combinations:
        name = file_name("-".join([f"m{params['margin']}", *(f"{key.split('.')[-1]}={params[key]}" for key in sweep)]))
        # all arguments that determine the folder, so that a config cannot change it
        location = {"save_dir": str(folder), "name": name, "version": "", "sub_dir": None, "prefix": ""}
        logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": location | {"default_hp_metric": False},
        }
        args = [f"--config={config}" for config in configs] + list(settings)
        args += [f"--{key}={format_argument(params[key])}" for key in sweep]
        with _quiet_lightning():
            args += [f"--model.margin={params['margin']}", f"--trainer.logger={json.dumps(logger)}"]
            cli = InstantiatedCLI(["fit", *args, "--trainer.default_root_dir=null"])
            if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise InputError("trainer.fast_dev_run: leaves no results to compare; use --trainer.max_steps.")
            resolved = cli.settings()
            if resolved["data"] not in prepared:  # here, because parallel runs would download the same files
                cli.datamodule.prepare_data()
                prepared.append(resolved["data"])
        for seed in seeds:
            config = copy.deepcopy(resolved) | {"seed_everything": seed}
            run_name = f"{name}-s{seed}"
            config["trainer"]["logger"]["init_args"]["name"] = run_name
            runs.append(Run(folder / run_name, {**params, "seed": seed}, config))
    folders = {run.folder for run in runs}
    configurations = {
        repr({key: value for key, value in flat(run.config).items() if not _is_under(key, _OUTPUT_KEYS)})
        for run in runs
    }
    if min(len(folders), len(configurations)) < len(runs):
        run_names = ", ".join(sorted(run.folder.name for run in runs))
        raise InputError(f"--sweep: two runs have the same name or settings, got {run_names}; remove a value.")
    existing = _existing_runs(folder)
    for run in runs:
        run.check(existing)
    return sorted(runs, key=lambda run: seeds.index(run.params["seed"]))


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Suppress Lightning's messages about devices and seeds, which would be repeated for every combination."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
