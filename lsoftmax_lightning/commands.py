"""The commands ``compare`` and ``export``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from .command_parser import CommandParser
from .compare import compare_margins, report
from .config_paths import expand_path
from .errors import InputError
from .export import Format, Pixels, export
from .lightning_cli import InstantiatedCLI
from .settings import is_package_class
from .signals import Stopped


def run_compare(args: list[str]) -> None:
    """Train a config with several margins and seeds, and compare the runs.

    Args:
        args: Arguments of ``lsoftmax_lightning compare``; ``--help`` lists them.

    Raises:
        InputError: If the arguments do not define a comparison.
        RunError: If a run fails.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(compare_margins).parameters.items()}
    margins, seeds = (" ".join(map(str, defaults[name])) for name in ("margins", "seeds"))
    parser = CommandParser(
        prog="lsoftmax_lightning compare",
        usage="%(prog)s --config NAME [--margins M ...] [--seeds S ...] [--jobs N] [--KEY VALUE ...]\n"
        "       %(prog)s --report PATH ... [--folder FOLDER]",
        description="Train a config with several margins and seeds. One folder contains all results: results.csv (one "
        "row per run), table.md, plots, and the runs for TensorBoard. Repeat an interrupted command to resume it. With "
        "more margins, seeds or values, only the new runs are trained.",
        epilog="All settings of `fit` are accepted and apply to all runs, for example --trainer.max_steps 600.",
    )
    parser.add_argument(
        "-c", "--config", action="append", metavar="NAME", help="path of a config, or name of a shipped one"
    )
    parser.add_argument("--margins", action="extend", nargs="+", type=int, metavar="M", help=f"default: {margins}")
    parser.add_argument("--seeds", action="extend", nargs="+", type=int, metavar="S", help=f"default: {seeds}")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="cross the margins with the values of another setting; can be repeated",
    )
    parser.add_argument(
        "--average",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="like --sweep, but average over the values and pair runs by them, as for the folds of a cross-validation",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=defaults["jobs"],
        metavar="N",
        help="number of runs at a time, each on its own devices or cores",
    )
    parser.add_argument("--folder", type=_path, help="folder of the results (default: runs/compare-NAME)")
    parser.add_argument("--html", action="store_true", help="also write table and plots to a single page, report.html")
    parser.add_argument(
        "--report",
        action="extend",
        nargs="+",
        type=_path,
        metavar="PATH",
        help="print one table of all runs in these folders or results.csv files, without training, and "
        "write table and plots to --folder (default: the folder of a single comparison)",
    )
    given, settings = parser.parse_options(args)
    if given.report:
        folder = ["--folder", str(given.folder)] if given.folder else []
        folder += ["--html"] if given.html else []
        if settings or given != parser.parse_args(["--report", *map(str, given.report), *folder]):
            raise InputError(
                "--report: accepts only --folder and --html, since nothing is trained, got "
                f"{' '.join(args)}; remove the other arguments."
            )
        report(given.report, given.folder, html=given.html)
        return
    if not given.config:
        raise InputError("--config: is required, got nothing; try --config digits.yaml --margins 1 4 --seeds 0 1 2")
    sweep, average = (_values(option, getattr(given, option)) for option in ("sweep", "average"))
    try:
        compare_margins(
            given.config,
            given.margins or defaults["margins"],
            given.seeds or defaults["seeds"],
            settings,
            sweep,
            given.jobs,
            given.folder,
            average,
            given.html,
        )
    except Stopped:
        print("Repeat the command to resume.", file=sys.stderr)
        raise


class _DatesAreTexts(yaml.SafeLoader):  # type: ignore[misc] # PyYAML has no types
    """Loader that reads a date, such as the name of a folder, as a text."""


_DatesAreTexts.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)


def _values(option: str, texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parse ``KEY=V1,V2``."""
    values = {}
    for text in texts:
        key, _, listed = text.partition("=")
        if key in values:
            raise InputError(f"--{option}: has a duplicate setting, got {key} twice; list all its values: KEY=V1,V2.")
        try:
            values[key] = yaml.load(f"[{listed}]", _DatesAreTexts)
        except yaml.YAMLError as error:
            raise InputError(f"--{option}: must be KEY=V1,V2, got {text!r}: {error}") from error
    return values


def _path(text: str) -> Path:
    return Path(expand_path(text))


def run_export(args: list[str]) -> None:
    """Write the network of a checkpoint to a file for use without this package.

    Args:
        args: Arguments of ``lsoftmax_lightning export``; ``--help`` lists them.

    Raises:
        InputError: If an argument is invalid or the network cannot be exported.
        RunError: If the outputs of the file differ from those of the module.
    """
    parser = CommandParser(
        prog="lsoftmax_lightning export",
        usage="%(prog)s --ckpt_path FILE [--format FORMAT] [--output FILE] [--pixels KIND] [--KEY VALUE ...]",
        description="Write a network from pixels to embeddings and plain logits to a file, for batches of any size. "
        "Compare its outputs with those of the module. The metadata contain class names and normalisation. The format "
        "state_dict contains only the weights of the backbone.",
        epilog="All settings of the config are accepted, for example --data.root my_images.",
    )
    suffixes = dict(zip(get_args(Format), ("model.onnx", "model.pt2", "backbone.pt"), strict=True))
    parser.add_argument("--ckpt_path", type=expand_path, required=True, metavar="FILE", help="checkpoint of fit")
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="NAME",
        help="config of the network (default: that of its run); later ones override earlier ones",
    )
    parser.add_argument("--format", choices=suffixes, default="onnx", help="format of the file (default: onnx)")
    parser.add_argument("--output", type=expand_path, metavar="FILE", help=f"default: {', '.join(suffixes.values())}")
    parser.add_argument(
        "--pixels", choices=get_args(Pixels), default="uint8", help="input: uint8, or float from 0 to 1"
    )
    given, settings = parser.parse_options(args)
    config = Path(given.ckpt_path).absolute().parent.parent / "config.yaml"
    if not given.config and not config.is_file():
        if "://" not in given.ckpt_path and not Path(given.ckpt_path).is_file():
            raise InputError(f"--ckpt_path: must be a checkpoint of fit, got {given.ckpt_path}, which is not a file.")
        raise InputError(
            f"--config: must be set, because the run folder of the checkpoint, {config.parent}, has no config.yaml."
        )
    alone = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    configs = [f"--config={name}" for name in given.config or [config]]
    restored = InstantiatedCLI(["predict", *configs, f"--ckpt_path={given.ckpt_path}", *alone, *settings])
    output = given.output or suffixes[given.format]
    # the user's own datamodule may normalise in another way, so its test images are compared
    spec = restored.model.data_spec
    known = spec is not None and spec.class_names and spec.mean and spec.std
    data = None if known and is_package_class(type(restored.datamodule)) else restored.datamodule
    found = export(restored.model, data, output, given.format, given.pixels)
    differs = " and ".join(f"{difference:.2g} in the {name}" for name, difference in found.items())
    images = "test images" if data else "random images"
    print(f"Wrote {output}." + (f" On {images}, it differs from the module by at most {differs}." if found else ""))
