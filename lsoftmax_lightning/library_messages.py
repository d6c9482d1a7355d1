"""Texts of errors and warnings of Lightning, jsonargparse and torch that this package needs; imports none of them.

``tests/test_compat.py`` fails if a library changes what is relied on here. A version in a docstring is one in which it
was seen.
"""

from __future__ import annotations

import re
from pickle import UnpicklingError

LEAF_SPEC_WARNING = ".*treespec, LeafSpec"
"""Regex of a deprecation warning of torch 2.14 about Lightning 2.6.6 itself, which a user cannot fix."""

USED_FOLDER_WARNING = "Checkpoint directory"
"""Regex of the warning of Lightning 2.6.6 that a folder of checkpoints is not empty."""

UNNEEDED_MESSAGES = (
    "💡 Tip|TPU available|GPU available: False|`Trainer.fit` stopped: `max"
    "|Restoring states from|Loaded model weights from"
)
"""Regex of log messages of Lightning 2.6.6 about other products, absent devices, or what the commands print anyway."""

ADVICE = {
    "Expected more than 1 value per channel": "batch normalisation takes 2 images or more a device: raise batch_size.",
    "Kernel size can't be greater than actual input size": "the images are too small for this backbone.",
    "Output size is too small": "the images are too small for this backbone.",
    "SyncBatchNorm layers only work with GPU": "synchronised batch normalisation works on GPUs alone.",
    "gloo/transport/tcp/pair.cc": "another process of the run died; above is its own error, or none if it was killed.",
    "can't allocate memory": "these settings take more memory than there is.",
    "EADDRINUSE": "the port is in use: set the environment variable MASTER_PORT to another one.",
}
"""Messages of libraries about settings that do not go together, and what a user can do."""


def hidden_constructor_message(error: BaseException) -> str | None:
    """Return the message of a constructor's error that jsonargparse replaced by another; None if it did not.

    For an optional class jsonargparse 4.40 chains the error of ``None``, and the text of ``error`` has the other; 4.53
    chains that of the constructor.
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
    """Return the required settings that a parser misses, and the class that has them, if it is not the parser itself.

    jsonargparse 4.53 names all of them, 4.40 the first.
    """
    match = re.search(r"arguments are required: (.+)", message)
    names = match[1].split(", ") if match else re.findall(r'Key "([^"]+)" is required', message)[:1]
    owners = re.findall(r"Problem with given class_path '([^']+)'", message)
    return names, owners[-1] if owners else None


def refused_code(error: UnpicklingError) -> str | None:
    """Return the name of the code that ``torch.load(weights_only=True)`` refused to run (torch 2.14)."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    return match and match[1]


def worker_message(error: Exception) -> str:
    """Return the message of an error of a DataLoader's worker, which comes with its traceback (torch 2.14).

    An error of this process keeps its message.
    """
    return str(error).strip().rpartition(f"{type(error).__name__}: ")[2]


def spawned_rank_message(error: BaseException, kinds: str) -> str | None:
    """Return the message of the error of a spawned rank, which comes as the text of its traceback (torch 2.14).

    Args:
        error: The ``ProcessRaisedException`` in this process.
        kinds: Regex of full names of classes.

    Returns:
        The message; None for an error of another class.
    """
    match = re.search(rf"^(?:{kinds}): (.+)", str(error), re.MULTILINE | re.DOTALL)
    return match and match[1].strip()
