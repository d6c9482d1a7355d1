"""Parser of the commands ``compare``, ``configs`` and ``export``.

This module does not import torch.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from typing_extensions import override

from .errors import SettingsError

_MIN_SIMILARITY = 0.75
_SETTINGS = ("checkpoint", "ckpt_path", "dashboard", "data", "model", "seed_everything", "trainer", "weights_only")


class CommandParser(argparse.ArgumentParser):
    """Argument parser with one-line errors and suggestions for misspelt options."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    @override
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message.removeprefix('argument ')}; see {self.prog} --help.")

    def parse_options(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse the options of the command; return them and the other arguments, which are settings of ``fit``.

        Raises:
            SettingsError: If an option is invalid or misspelt.
        """
        options, settings = self.parse_known_args(args)
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        for word in settings:
            name = word.partition("=")[0]
            if not name.startswith("--") or "." in name or name.removeprefix("--") in _SETTINGS:
                continue
            if similar := difflib.get_close_matches(name, known, n=1, cutoff=_MIN_SIMILARITY):
                raise SettingsError(f"{name}: is not an option of {self.prog}; did you mean {similar[0]}?")
        return options, settings
