"""Errors that a user can fix. Messages have the form ``<setting>: <problem>, got <value>; <what to do>``."""

MAX_ERROR_LINES = 30
"""Maximum number of lines of a message that the command line prints."""


class LSoftmaxError(Exception):
    """Base class of the errors of this package. The command line prints them without a traceback."""


class InputError(LSoftmaxError, ValueError):
    """An argument, a tensor or a setting is invalid."""


class SettingsError(InputError):
    """The command line or a config file is invalid."""


class DataError(LSoftmaxError, RuntimeError):
    """Images or labels are missing or damaged, or cannot be downloaded."""


class DivergenceError(LSoftmaxError, RuntimeError):
    """The training loss became NaN or infinite."""


class RunError(LSoftmaxError, RuntimeError):
    """A run failed, or a file could not be written."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
