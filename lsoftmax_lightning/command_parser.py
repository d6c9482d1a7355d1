"""The parser of the commands ``compare``, ``configs`` and ``export``.

This module does not import torch.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import SettingsError

_MIN_SIMILARITY = 0.75
_SETTINGS = ("checkpoint", "ckpt_path", "dashboard", "data", "model", "seed_everything", "trainer", "weights_only")


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors take one line, and which names the option that a misspelt one may mean."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise a SettingsError in place of printing the usage."""
        raise SettingsError(f"{message.removeprefix('argument ')}; see {self.prog} --help.")

    def parse_options(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the options, and the other arguments, which are settings of ``fit``.

        Raises:
            SettingsError: If an option is wrong or misspelt.
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
