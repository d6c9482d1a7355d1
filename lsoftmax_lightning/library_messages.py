"""Texts of errors and warnings of Lightning, jsonargparse and torch, none of which this module imports.

``tests/test_compat.py`` fails if a library changes one of them. The docstrings give versions that have them.
"""

from __future__ import annotations

import re
from pickle import UnpicklingError

LEAF_SPEC_WARNING = ".*treespec, LeafSpec"
"""Regex of a deprecation warning of torch 2.14 about code in Lightning 2.6.6, which a user cannot fix."""

USED_FOLDER_WARNING = "Checkpoint directory"
"""Regex of Lightning 2.6.6's warning that the folder of checkpoints is not empty."""

USED_LOG_WARNING = "Experiment logs directory"
"""Regex of the warning of Lightning 2.6.6's CSVLogger that its folder is not empty."""

UNNEEDED_MESSAGES = (
    "💡 Tip|TPU available|GPU available: False|`Trainer.fit` stopped: `max"
    "|Restoring states from|Loaded model weights from"
)
"""Regex of Lightning 2.6.6's log messages about other products and absent devices, and of redundant ones."""

ADVICE = {
    "Expected more than 1 value per channel": "batch normalisation needs 2 images or more per device; raise batch_size",
    "Kernel size can't be greater than actual input size": "the images are too small for this backbone; enlarge them.",
    "Output size is too small": "the images are too small for this backbone; enlarge them.",
    "SyncBatchNorm layers only work with GPU": "sync_batchnorm: needs GPUs; set it to false.",
    "gloo/transport/tcp/pair.cc": "another process of the run ended; see its error above, if it was not killed.",
    "can't allocate memory": "out of memory: lower batch_size or the size of images and network.",
    "EADDRINUSE": "the port is in use; set the environment variable MASTER_PORT to another port.",
}
"""Messages of libraries about invalid combinations of settings, and messages for the user."""


def hidden_constructor_message(error: BaseException) -> str | None:
    """Return the message of a constructor's error that jsonargparse hides; None if there is none.

    For an optional class, jsonargparse 4.40 chains only the error of ``None``; the text of ``error`` contains the
    message of the constructor. jsonargparse 4.53 chains the error of the constructor.
    """
    cause: BaseException | None = error
    while cause is not None and not str(cause).startswith("Expected a <class 'NoneType'>"):
        cause = cause.__cause__
    if cause is None:
        return None
    pattern = r"(?ms)^ +- (?!Expected a <class|Does not validate)(.+?)(?=\n +- |\n *Given value|\Z)"
    match = re.search(pattern, str(error))
    return match[1] if match else str(error)


def missing_settings(message: str) -> tuple[list[str], str | None]:
    """Return the missing settings in a parser's message, and the class that requires them, if any.

    jsonargparse 4.53 names all missing settings, 4.40 the first.
    """
    match = re.search(r"arguments are required: (.+)", message)
    names = match[1].split(", ") if match else re.findall(r'Key "([^"]+)" is required', message)[:1]
    owners = re.findall(r"Problem with given class_path '([^']+)'", message)
    return names, owners[-1] if owners else None


def refused_code(error: UnpicklingError) -> str | None:
    """Return the name of the code that ``torch.load(weights_only=True)`` rejected (torch 2.14)."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    return match and match[1]


def worker_message(error: Exception) -> str:
    """Return the message of an error in a DataLoader worker without the worker's traceback (torch 2.14).

    The message of an error in this process is unchanged.
    """
    return str(error).strip().rpartition(f"{type(error).__name__}: ")[2]


def spawned_rank_message(error: BaseException, kinds: str) -> str | None:
    """Return the message of an error in a spawned rank without the rank's traceback (torch 2.14).

    Args:
        error: The ``ProcessRaisedException`` in this process.
        kinds: Regex of the full names of error classes.

    Returns:
        The message; None for an error of another class.
    """
    match = re.search(rf"^(?:{kinds}): (.+)", str(error), re.MULTILINE | re.DOTALL)
    return match and match[1].strip()
