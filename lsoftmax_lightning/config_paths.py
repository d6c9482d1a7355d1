"""Paths of config files. This module imports neither torch nor Lightning."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from .errors import InputError

_PACKAGE = Path(__file__).parent
# inside the package in a wheel, beside it in a checkout
CONFIGS = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())


def expand_path(path: str) -> str:
    """Return a path with ``~`` and environment variables expanded; unset variables are kept."""
    return os.path.expanduser(os.path.expandvars(path))


def find_config(name: str) -> Path:
    """Find a config by its path, or a shipped config by its name.

    Args:
        name: Path of a config, or name of a shipped one, with or without ``.yaml``.

    Raises:
        InputError: If there is no such config.
    """
    for path in (Path(expand_path(name)), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = [path.name for path in sorted(CONFIGS.glob("*.yaml"))]
    stems = {known.removesuffix(".yaml"): known for known in [*shipped, *(path.name for path in Path().glob("*.yaml"))]}
    if similar := difflib.get_close_matches(name.removesuffix(".yaml"), stems, n=1):
        near = stems[similar[0]]
        raise InputError(f"no config {name!r} in {Path.cwd()} nor among the shipped ones; did you mean {near}?")
    raise InputError(f"no config {name!r} in {Path.cwd()} nor among the shipped ones: {', '.join(shipped)}.")
