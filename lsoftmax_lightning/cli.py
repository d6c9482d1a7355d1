"""The command line: Lightning's commands, and ``compare``, ``export`` and ``configs``.

torch is imported only when a command needs it, so that ``--help``, ``--version``, ``configs`` and an invalid command
are fast.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .command_parser import CommandParser
from .config_paths import CONFIGS, find_config
from .errors import InputError
from .short_help import print_short_help
from .signals import stop_if_received
from .user_errors import errors_without_traceback

if TYPE_CHECKING:
    from .lightning_cli import LSoftmaxCLI

__all__ = ["CONFIGS", "main"]


def configs(args: list[str]) -> None:
    """List the shipped configs, or copy one to the working directory.

    Args:
        args: Empty, or ``--copy NAME``.

    Raises:
        InputError: If there is no config of this name, or the copy would overwrite a file.
    """
    parser = CommandParser(prog="lsoftmax_lightning configs", description="List the shipped configs.")
    parser.add_argument("--copy", metavar="NAME", help="copy this config to the working directory")
    name = parser.parse_args(args).copy
    if name is None:
        for path in sorted(CONFIGS.glob("*.yaml")):
            first_line = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            print(f"{path.name:20}{first_line}")
        return
    source = find_config(name)
    if Path(source.name).exists():
        raise InputError(f"--copy: {source.name} already exists in {Path.cwd()}; move it first.")
    shutil.copyfile(source, source.name)
    print(f"Copied to {Path(source.name).absolute()}")


def compare(args: list[str]) -> None:
    """Train a config with several margins and seeds, and compare the runs."""
    from .commands import run_compare

    run_compare(args)


def export(args: list[str]) -> None:
    """Write the network of a checkpoint to a file for use without this package."""
    from .commands import run_export

    run_export(args)


OWN_COMMANDS = {"compare": compare, "configs": configs, "export": export}
"""Commands beside those of Lightning: functions of the arguments. The help shows the first line of their docstrings."""

LIGHTNING_COMMANDS = {
    "fit": "Train a model, then test its best checkpoint.",
    "validate": "Evaluate a model on the validation set.",
    "test": "Evaluate a model on the test set.",
    "predict": "Write predictions for the test set, or for a folder of images, to a file.",
}
COMMANDS = {
    **LIGHTNING_COMMANDS,
    **{name: str(command.__doc__).splitlines()[0] for name, command in OWN_COMMANDS.items()},
}
"""All commands, with their descriptions in the help."""


def _parser() -> argparse.ArgumentParser:
    """Return the parser of ``--help`` and ``--version``."""
    parser = argparse.ArgumentParser(
        prog="lsoftmax_lightning",
        usage="%(prog)s COMMAND [--config NAME] [--KEY VALUE ...]",
        description="Large-Margin Softmax (Liu et al., ICML 2016) for PyTorch Lightning.",
        epilog="`%(prog)s COMMAND --help` lists the settings of a command. Start with: fit --config digits.yaml",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('lsoftmax-lightning')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description)
    return parser


def _refuse(command: str | None) -> NoReturn:
    """Print an error with the most similar command, and exit with code 2, as for every invalid argument.

    Args:
        command: The invalid command; None if none was given.
    """
    *names, last_name = COMMANDS
    similar = difflib.get_close_matches(command or "", COMMANDS, n=1)
    got = "nothing" if command is None else repr(command)
    advice = f"did you mean {similar[0]}?" if similar else "see lsoftmax_lightning --help."
    print(f"error: command: must be {', '.join(names)} or {last_name}, got {got}; {advice}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def _without_garbage_collection(freeze: bool) -> Iterator[None]:
    """Disable the garbage collector in the block, which imports torch and Lightning.

    They create 800,000 objects that live as long as the process. Collections take a fifth of the time of the import,
    and the same time again at the end of the process.

    Args:
        freeze: Whether to exclude the objects that exist at the end of the block from all later collections.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if was_enabled:
            gc.enable()


def main(args: list[str] | None = None) -> LSoftmaxCLI | None:
    """Run the command line.

    Args:
        args: The arguments. Default: those of the process.

    Returns:
        The CLI object, with ``trainer``, ``model`` and ``datamodule``; None for :data:`OWN_COMMANDS`.

    Raises:
        SystemExit: After an error that the user can fix, which is printed without a traceback.
    """
    owns_process = args is None
    args = sys.argv[1:] if args is None else args
    with errors_without_traceback():
        command = args[0] if args else None
        if command in ("-h", "--help", "--version"):
            _parser().parse_args([command])
        if command is None or not (command in COMMANDS or command.startswith("-")):
            _refuse(command)
        if command in LIGHTNING_COMMANDS:
            if {"-h", "--help"} & set(args):
                print_short_help(str(command), COMMANDS[str(command)], args[1:])
                return None
            args = ["--help" if arg == "--full_help" else arg for arg in args]
        if command != "configs":
            try:
                with _without_garbage_collection(freeze=owns_process):
                    from . import lightning_cli
            finally:
                stop_if_received()  # an import may swallow the exception of a signal, or fail because of it
        if command in OWN_COMMANDS:
            OWN_COMMANDS[command](args[1:])
            return None
        return lightning_cli.LSoftmaxCLI(args)
