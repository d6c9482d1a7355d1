"""The command line: Lightning's commands, ``compare`` for margins and seeds, and ``configs`` to find the YAML."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import yaml

from .compare import compare, report
from .errors import InputError
from .lightning_cli import CONFIGS, LSoftmaxCLI, find_config, mistakes_in_a_line

__all__ = ["CONFIGS", "main"]


def configs(args: list[str]) -> None:
    """Lists the shipped configs with a line each, or copies one into the working directory.

    Args:
        args: Nothing, or ``--copy NAME``.

    Raises:
        InputError: If the name is wrong or the copy would overwrite a file.
    """
    parser = argparse.ArgumentParser(prog="lsoftmax_lightning configs", description="The shipped configs.")
    parser.add_argument("--copy", metavar="NAME", help="copy this one into the working directory")
    name = parser.parse_args(args).copy
    if name is None:
        for path in sorted(CONFIGS.glob("*.yaml")):
            first_line = path.read_text().splitlines()[0].removeprefix("# ")
            print(f"{path.name:18}{first_line}")
        return
    source = find_config(name)
    if Path(source.name).exists():
        raise InputError(f"{source.name} is already in {Path.cwd()}; move it away first.")
    shutil.copyfile(source, source.name)
    print(f"Copied to {Path(source.name).absolute()}")


def compare_margins(args: list[str]) -> None:
    """Trains a config at several margins and seeds, and compares.

    Args:
        args: As ``lsoftmax_lightning compare --help`` has them.

    Raises:
        InputError: If they do not make a comparison.
        RunError: If a training failed.
    """
    parser = argparse.ArgumentParser(
        prog="lsoftmax_lightning compare",
        usage="%(prog)s --config NAME [--margins M ...] [--seeds S ...] [--jobs N] [--KEY VALUE ...]\n"
        "       %(prog)s --report FOLDER",
        description="Trains a config at several margins and seeds. All is left in one folder: results.csv (a row for "
        "each run), table.md, figures, and the runs for TensorBoard. The same command again goes on where it was "
        "interrupted; with more margins, seeds or values it trains only what is new.",
        epilog="Any other setting is one of `fit`, the same for all runs, as in --trainer.max_steps 600.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c", "--config", action="append", metavar="NAME", help="a path, or the name of a shipped config"
    )
    parser.add_argument("--margins", nargs="+", type=int, default=[1, 2, 3, 4], metavar="M", help="default: 1 2 3 4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="cross with these values of one more setting; may be given again",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once, on devices or cores of their own"
    )
    parser.add_argument("--folder", type=Path, help="where all is left (default: runs/compare-NAME)")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="make table and figures of FOLDER again; no training"
    )
    given, settings = parser.parse_known_args(args)
    if given.report:
        if settings or given != parser.parse_args(["--report", str(given.report)]):
            raise InputError("--report takes a folder and no other argument: it trains nothing.")
        report(given.report)
        return
    if not given.config:
        raise InputError("compare needs a config, as in: compare --config digits.yaml --margins 1 4 --seeds 0 1 2")
    sweep = {}
    for text in given.sweep:
        key, _, values = text.partition("=")
        try:
            sweep[key] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise InputError(f"--sweep takes KEY=V1,V2, got {text!r}: {error}") from error
    try:
        compare(given.config, given.margins, given.seeds, settings, sweep, given.jobs, given.folder)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None


def main(args: list[str] | None = None) -> LSoftmaxCLI | None:
    """Runs the command line.

    Args:
        args: The arguments, by default those of the process.

    Returns:
        The CLI object, with ``trainer``, ``model`` and ``datamodule``; nothing for ``compare`` and ``configs``.

    Raises:
        SystemExit: With a message and no traceback, for whatever the user can mend.
    """
    args = sys.argv[1:] if args is None else args
    own_commands = {"compare": compare_margins, "configs": configs}
    with mistakes_in_a_line():
        if not args or args[0] not in own_commands:
            return LSoftmaxCLI(args)
        own_commands[args[0]](args[1:])
    return None
