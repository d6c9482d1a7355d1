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
from ..config_files import flat, read_yaml
from ..errors import InputError
from ..functional import check_margin
from ..lightning_cli import InstantiatedCLI
from .results import damaged_config, read_facts_and_metrics
from .text import file_name, format_argument

_OUTPUT_KEYS = ("trainer.logger", "trainer.default_root_dir", "checkpoint.dirpath")
_RESERVED_KEYS = ("model.margin", "seed_everything", "ckpt_path", *_OUTPUT_KEYS)  # set by the comparison


@dataclass(frozen=True, eq=False)
class Run:
    """A training of a comparison, finished or not.

    Attributes:
        folder: Folder of its checkpoints, logs and results.
        params: ``margin``, ``seed`` and the swept settings by name: what distinguishes it from the other runs.
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
            existing: Those runs, see :func:`_existing_runs`.

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
            rank_zero_warn(f"{damaged} is missing or damaged; its run is not taken for finished.")
        expected = flat(self.config)
        for folder, (found, params) in existing.items():
            ignored = set(_RESERVED_KEYS)
            if folder != self.folder:
                if not params:
                    continue
                ignored |= {*self.params, *params}
            elif finished is None:  # it continues from checkpoints, which are in the folder that these keys set
                ignored -= set(_OUTPUT_KEYS)
                if _is_truncated(found, expected):  # by a release that did not write the file atomically
                    rank_zero_warn(
                        f"{folder / 'config.yaml'} is incomplete and is written anew; checkpoints in {folder} are kept."
                    )
                    found = dict(list(found.items())[:-1])
                    ignored |= expected.keys() - found.keys()
            for key in {**expected, **found}:
                there, here = found.get(key, "nothing"), expected.get(key, "nothing")
                if there != here and not _is_under(key, ignored):
                    raise InputError(
                        f"{folder} is of a run with other settings: {key} is {there} there and {here} here. Give "
                        "this comparison a --folder of its own, or remove that run."
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
    """Return whether settings are the beginning of the expected ones; the last value may be truncated, too."""
    names = list(found)
    return names[:-1] == list(expected)[: len(names[:-1])] and (
        len(found) < len(expected) or found[names[-1]] != expected.get(names[-1])
    )


def _is_under(key: str, settings: Collection[str]) -> bool:
    """Return whether a key is one of these settings, or a part of one."""
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

    To check the settings, this creates model, data and Trainer once for each margin and combination of swept values,
    and downloads the data.

    Args:
        configs: Paths or names of shipped configs; later ones override earlier ones.
        margins: Margins m.
        seeds: Seeds of the training, from 0.
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
            raise InputError(f"{name} takes one value or more, no two the same, got {list(values)}.")
    for margin in margins:
        check_margin(margin)
    if min(seeds) < 0:
        raise InputError(f"seeds count from 0, got {min(seeds)}.")
    if max(seeds) >= 2**32:
        raise InputError(f"seeds: must be from 0 to {2**32 - 1}, got {max(seeds)}.")
    options = [word.removeprefix("--").partition("=")[0] for word in settings if word.startswith("--")]
    for name in [*options, *sweep]:
        if _is_under(name.replace(".init_args", ""), _RESERVED_KEYS):
            raise InputError(f"{name} cannot be set: a comparison says it by --margins, --seeds and --folder.")
    combinations: list[dict[str, Any]] = [
        {"margin": margin} | dict(zip(sweep, values, strict=True))
        for margin, *values in itertools.product(margins, *sweep.values())
    ]
    runs: list[Run] = []
    prepared: list[Any] = []  # settings of the data that are downloaded
    for params in combinations:
        name = file_name("-".join([f"m{params['margin']}", *(f"{key.split('.')[-1]}={params[key]}" for key in sweep)]))
        # every argument that determines the folder, so that a config cannot change it
        place = {"save_dir": str(folder), "name": name, "version": "", "sub_dir": None, "prefix": ""}
        logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": place | {"default_hp_metric": False},
        }
        args = [f"--config={config}" for config in configs] + list(settings)
        args += [f"--{key}={format_argument(params[key])}" for key in sweep]
        with _quiet_lightning():
            args += [f"--model.margin={params['margin']}", f"--trainer.logger={json.dumps(logger)}"]
            cli = InstantiatedCLI(["fit", *args, "--trainer.default_root_dir=null"])
            if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise InputError("a fast_dev_run leaves nothing to compare; take --trainer.max_steps instead.")
            resolved = cli.settings()
            if resolved["data"] not in prepared:  # here, since runs at once would download the same files
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
        raise InputError(f"two runs would have the same name: {', '.join(sorted(run.folder.name for run in runs))}.")
    existing = _existing_runs(folder)
    for run in runs:
        run.check(existing)
    return sorted(runs, key=lambda run: seeds.index(run.params["seed"]))


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Suppress Lightning's messages on devices and seeds, which would be repeated for every combination."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
