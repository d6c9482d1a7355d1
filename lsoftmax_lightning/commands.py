"""The commands ``compare`` and ``export``: their arguments, and what they print."""

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
from .settings import is_ours
from .signals import Stopped


def run_compare(args: list[str]) -> None:
    """Train a config at several margins and seeds, and compare the runs.

    Args:
        args: Arguments of ``lsoftmax_lightning compare``; ``--help`` lists them.

    Raises:
        InputError: If the arguments do not define a comparison.
        RunError: If a run failed.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(compare_margins).parameters.items()}
    margins, seeds = (" ".join(map(str, defaults[name])) for name in ("margins", "seeds"))
    parser = CommandParser(
        prog="lsoftmax_lightning compare",
        usage="%(prog)s --config NAME [--margins M ...] [--seeds S ...] [--jobs N] [--KEY VALUE ...]\n"
        "       %(prog)s --report PATH ... [--folder FOLDER]",
        description="Trains a config at several margins and seeds. All is left in one folder: results.csv (a row for "
        "each run), table.md, figures, and the runs for TensorBoard. The same command again goes on where it was "
        "interrupted; with more margins, seeds or values it trains only what is new.",
        epilog="Any other setting is one of `fit`, the same for all runs, as in --trainer.max_steps 600.",
    )
    parser.add_argument(
        "-c", "--config", action="append", metavar="NAME", help="a path, or the name of a shipped config"
    )
    parser.add_argument(
        "--margins", nargs="+", type=int, default=list(defaults["margins"]), metavar="M", help=f"default: {margins}"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(defaults["seeds"]), metavar="S", help=f"default: {seeds}"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="cross with these values of one more setting; may be given again",
    )
    parser.add_argument(
        "--average",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="like --sweep, but the table has means over these values and pairs runs by them, as for folds",
    )
    parser.add_argument(
        "--jobs", type=int, default=defaults["jobs"], metavar="N", help="runs at once, on devices or cores of their own"
    )
    parser.add_argument("--folder", type=_path, help="where all is left (default: runs/compare-NAME)")
    parser.add_argument("--html", action="store_true", help="write table and figures also as one page, report.html")
    parser.add_argument(
        "--report",
        action="extend",
        nargs="+",
        type=_path,
        metavar="PATH",
        help="print the table of folders or results.csv files of compare, all runs together, without training; table "
        "and figures are written to --folder, by default that of a single comparison",
    )
    given, settings = parser.parse_options(args)
    if given.report:
        folder = ["--folder", str(given.folder)] if given.folder else []
        folder += ["--html"] if given.html else []
        if settings or given != parser.parse_args(["--report", *map(str, given.report), *folder]):
            raise InputError(
                "--report: takes no other argument than --folder and --html, since nothing is trained, got "
                f"{' '.join(args)}; remove the others."
            )
        report(given.report, given.folder, html=given.html)
        return
    if not given.config:
        raise InputError("compare needs a config, as in: compare --config digits.yaml --margins 1 4 --seeds 0 1 2")
    sweep, average = (_values(option, getattr(given, option)) for option in ("sweep", "average"))
    try:
        compare_margins(
            given.config, given.margins, given.seeds, settings, sweep, given.jobs, given.folder, average, given.html
        )
    except Stopped:
        print("The same command continues from here.", file=sys.stderr)
        raise


def _values(option: str, texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parse KEY=V1,V2."""
    values = {}
    for text in texts:
        key, _, listed = text.partition("=")
        try:
            values[key] = yaml.safe_load(f"[{listed}]")
        except yaml.YAMLError as error:
            raise InputError(f"--{option} takes KEY=V1,V2, got {text!r}: {error}") from error
    return values


def _path(text: str) -> Path:
    return Path(expand_path(text))


def run_export(args: list[str]) -> None:
    """Writes the network of a checkpoint to a file for use without this package.

    Args:
        args: As ``lsoftmax_lightning export --help`` has them.

    Raises:
        InputError: If they do not name a network that can be exported.
        RunError: If what was exported gives something else than the module.
    """
    parser = CommandParser(
        prog="lsoftmax_lightning export",
        usage="%(prog)s --ckpt_path FILE [--format FORMAT] [--output FILE] [--pixels KIND] [--KEY VALUE ...]",
        description="Writes normalisation, backbone, embedding and margin-free logits to a file for batches of any "
        "size, and compares what it gives for images with what the module gives. Class names and normalisation "
        "are in its metadata. `state_dict` is the weights of the backbone alone.",
        epilog="Any other setting is one of the config, as in --data.root my_images.",
    )
    suffixes = dict(zip(get_args(Format), ("model.onnx", "model.pt2", "backbone.pt"), strict=True))
    parser.add_argument("--ckpt_path", type=expand_path, required=True, metavar="FILE", help="a checkpoint of fit")
    parser.add_argument("-c", "--config", metavar="NAME", help="its config (default: that of its run)")
    parser.add_argument("--format", choices=suffixes, default="onnx", help="default: onnx")
    parser.add_argument("--output", type=expand_path, metavar="FILE", help=f"default: {', '.join(suffixes.values())}")
    parser.add_argument("--pixels", choices=get_args(Pixels), default="uint8", help="of images; floats are 0 to 1")
    given, settings = parser.parse_options(args)
    config = given.config or Path(given.ckpt_path).parent.parent / "config.yaml"
    if not given.config and not config.is_file():
        raise InputError(f"there is no {config}, the config of the run that {given.ckpt_path} is of: give --config.")
    alone = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    restored = InstantiatedCLI(["predict", f"--config={config}", f"--ckpt_path={given.ckpt_path}", *alone, *settings])
    output = given.output or suffixes[given.format]
    # a datamodule of the user's may normalise in another way, which its test images show
    spec = restored.model.data_spec
    known = spec is not None and spec.class_names and spec.mean and spec.std
    data = None if known and is_ours(type(restored.datamodule)) else restored.datamodule
    found = export(restored.model, data, output, given.format, given.pixels)
    differs = " and ".join(f"{difference:.2g} in the {name}" for name, difference in found.items())
    images = "test images" if data else "random images"
    print(f"Wrote {output}." + (f" For {images} it differs from the module by at most {differs}." if found else ""))
