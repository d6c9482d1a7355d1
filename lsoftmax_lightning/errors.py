"""What a user can mend. The message says what was given, what was expected and what to do."""

MAX_ERROR_LINES = 30
"""Lines of a message that the command line prints."""


class LSoftmaxError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


class InputError(LSoftmaxError, ValueError):
    """An argument, a tensor or a setting is not what the function takes."""


class SettingsError(InputError):
    """The command line or a config file has a mistake."""


class DataError(LSoftmaxError, RuntimeError):
    """Images or labels are missing, damaged, or cannot be fetched."""


class DivergenceError(LSoftmaxError, RuntimeError):
    """The training loss became NaN or infinite."""


class RunError(LSoftmaxError, RuntimeError):
    """Runs of a comparison failed, or a file could not be written."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
