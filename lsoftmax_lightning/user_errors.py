"""Errors of the command line: a message for what a user can fix, a traceback for errors in the user's own code.

This module does not import torch and Lightning: some commands do not need them, and their import may fail.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MAX_ERROR_LINES, InputError, LSoftmaxError, SettingsError
from .library_messages import ADVICE, LEAF_SPEC_WARNING, hidden_constructor_message, spawned_rank_message
from .process_group import leave_process_group
from .signals import Stopped, exit_on_signals

_DEBUG = "LSOFTMAX_LIGHTNING_DEBUG"
_HINT = f"({_DEBUG}=1 prints the traceback.)"
_PATHS = sysconfig.get_paths()
LIBRARIES = (str(Path(__file__).parent), _PATHS["stdlib"], _PATHS["purelib"], _PATHS["platlib"], "<")
"""Beginnings of the file names of code that is not the user's."""
USER_ERRORS = r"lsoftmax_lightning\.errors\.\w+|lightning\.\S+\.MisconfigurationException"  # as tracebacks name them
_MISCONFIGURATION = ("lightning.fabric.utilities.exceptions", "MisconfigurationException")
_SPAWNED_RANK_ERROR = ("torch.multiprocessing.spawn", "ProcessRaisedException")


@contextmanager
def errors_of_settings() -> Iterator[None]:
    """Turn any error of a parser or a constructor into an error of the settings.

    Raises:
        InputError: For an error without a message for users.
    """
    try:
        yield
    except Exception as error:
        if user_message(error):
            raise
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        raise InputError(f"{type(cause).__name__}: {cause} {_HINT}") from error


@contextmanager
def errors_without_traceback() -> Iterator[None]:
    """Print a message for errors that a user can fix, and exit with code 1 or 2, or 130 or 143 after a signal.

    Errors in the user's own code keep their traceback. If the environment variable ``LSOFTMAX_LIGHTNING_DEBUG`` is set,
    all errors keep it, after the message.

    Raises:
        SystemExit: After an error or a signal.
    """
    try:
        with warnings.catch_warnings(), exit_on_signals(), _only_safe_checkpoints():
            warnings.filterwarnings("ignore", LEAF_SPEC_WARNING)
            yield
    except (Stopped, Exception) as error:
        if (stopped := _stopped(error)) is not None:
            print(f"Stopped by {stopped.signal.name}.", file=sys.stderr)
            raise stopped from None
        advice = user_message(error)
        debug = _DEBUG in os.environ
        if advice is None and (debug or _is_in_users_code(error)):
            raise
        text = str(advice) if advice is not None else f"{type(error).__name__}: {error} {_HINT}"
        print("\n".join(f"error: {text}".splitlines()[:MAX_ERROR_LINES]), file=sys.stderr)
        if debug:
            raise
        raise SystemExit(2 if isinstance(advice, SettingsError) else 1) from error
    finally:
        leave_process_group()


@contextmanager
def _only_safe_checkpoints() -> Iterator[None]:
    """Prevent all calls of :func:`torch.load` from running code in a file."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _stopped(error: BaseException | None) -> Stopped | None:
    """Return the :class:`Stopped` that ``error`` is or was raised from; None if there is none."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def _is_in_users_code(error: BaseException) -> bool:
    """Return whether the traceback contains, or may contain, files outside this package, libraries and Python."""
    frames = traceback.extract_tb(error.__traceback__)
    return _has_type(_SPAWNED_RANK_ERROR, error) or any(not frame.filename.startswith(LIBRARIES) for frame in frames)


def _has_type(kind: tuple[str, str], error: BaseException) -> bool:
    """Return whether an error has a class, given by module and name; False if the module is not imported."""
    module, name = kind
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


def user_message(error: BaseException) -> BaseException | str | None:
    """Return the error or message for the user behind the errors that jsonargparse chains; None if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LSoftmaxError):
            return cause
        cause = cause.__cause__
    if (hidden := hidden_constructor_message(error)) is not None:
        return hidden
    for message, advice in ADVICE.items():
        if message in str(error):
            return advice
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) or _has_type(_MISCONFIGURATION, cause):
            return cause
        cause = cause.__cause__
    return spawned_rank_message(error, USER_ERRORS) if _has_type(_SPAWNED_RANK_ERROR, error) else None
