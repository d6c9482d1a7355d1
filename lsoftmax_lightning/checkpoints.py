"""Checkpoints that are whole, safe to load, and of use to a network other than their own."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from .errors import InputError, RunError

FORMAT = 1
"""Of the checkpoints written; what was written before they had a number counts as 0."""

_KEY = "lsoftmax_lightning"


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when all of it is on the disk.

    So a run that is killed, or out of space, amid a checkpoint leaves the one that was there before. Lightning writes
    to the system's temporary folder, from where a move is a copy if that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: What to write.
            path: Where; a URL is left to Lightning.
            storage_options: None, as for Lightning.

        Raises:
            RunError: If it cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        part = Path(f"{path}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                patient = _Patient(file)
                torch.save(checkpoint, patient)  # type: ignore[arg-type]  # it asks for no more
                if patient.error is not None:
                    raise patient.error
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise RunError(
                f"the checkpoint {path} could not be written: {error.strerror}. What was there before is as it was; "
                "with room for it, --ckpt_path goes on from there."
            ) from error


class _Patient:
    """A file whose errors wait: amid :func:`torch.save` one would end the process."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Writes, while all goes well."""
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """As :meth:`write`."""
        try:
            if self.error is None:
                self.file.flush()
        except OSError as error:
            self.error = error


def stamp(checkpoint: dict[str, Any]) -> None:
    """Notes in a checkpoint by which release and in which format it is written.

    Args:
        checkpoint: As a module's ``on_save_checkpoint`` is given it.
    """
    checkpoint[_KEY] = {"format": FORMAT, "version": version("lsoftmax-lightning")}


def check_format(checkpoint: dict[str, Any]) -> None:
    """Refuses a checkpoint of a later release than this one.

    Args:
        checkpoint: As it was loaded.

    Raises:
        InputError: If it is.
    """
    made = checkpoint.get(_KEY, {"format": 0})
    if made["format"] > FORMAT:
        raise InputError(
            f"the checkpoint was written by lsoftmax-lightning {made['version']} in format {made['format']}; this is "
            f"{version('lsoftmax-lightning')}, which reads formats up to {FORMAT}: upgrade lsoftmax-lightning."
        )


def read(path: str | Path) -> dict[str, Any]:
    """Reads a file of weights that anybody may have made: no code in it is run, and damage is found.

    Args:
        path: Of a checkpoint of Lightning, or of what :func:`torch.save` made of a state dict.

    Returns:
        What is in it, with ``state_dict`` in any case.

    Raises:
        InputError: If it is not there, damaged, unsafe, or something else.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is no file; a checkpoint is one such as runs/digits/version_0/checkpoints/last.ckpt.")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch itself does not look at the checksums
        content = None if damaged else torch.load(path, "cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise InputError(
            f"{path} is refused: it holds more than weights and plain values, and to load it would run code"
            + (f" ({code[1]})." if code else ".")
        ) from error
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path} is no checkpoint, or only a part of one: what torch.save writes is a whole zip file."
        ) from error
    except Exception as error:  # whatever a decoder meets in a damaged file
        said = str(error) or type(error).__name__
        raise InputError(f"{path} is damaged: {said.splitlines()[0]}") from error
    if damaged:
        raise InputError(f"{path} is damaged: {damaged} in it is not what was written.")
    whole: dict[str, Any] = (
        content if isinstance(content, dict) and "state_dict" in content else {"state_dict": content}
    )
    weights = whole["state_dict"]
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise InputError(f"{path} has no state_dict, or one that has more than tensors in it.")
    check_format(whole)
    return whole


def warm_start(model: Any, path: str | Path) -> None:
    """Takes the weights of a network that was trained with plain softmax; says what was taken and what was not.

    The names of the layers need only end as they do here: what Lightning, DDP or ``torch.compile`` put in front of them
    is left out. The weight of the classifier is the one matrix beside the backbone's that has the shape of the head's;
    its bias is dropped, since L-Softmax has none (section 4 of the paper).

    Args:
        model: What offers ``backbone`` and ``head``.
        path: Of a checkpoint of Lightning, or of the state dict of a bare module.

    Raises:
        InputError: If the file is not to be had, is of another backbone, or has several matrices that may be the
            classifier's.
    """
    saved: dict[str, Tensor] = read(path)["state_dict"]
    own = model.backbone.state_dict()
    shape = {name: tuple(weight.shape) for name, weight in own.items()}
    # what stands before the names there, by how many weights it explains
    prefixes = Counter(there.removesuffix(name) for there in saved for name in own if f".{there}".endswith(f".{name}"))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    found = {name: saved[prefix + name] for name in own if prefix + name in saved}
    wrong = [name for name in own if name not in found or tuple(found[name].shape) != shape[name]]
    if wrong:
        name = wrong[0]
        there = tuple(found[name].shape) if name in found else "missing"
        raise InputError(
            f"{path} is not of this backbone: {name} is {there} there and {shape[name]} here"
            + (f", and so on for {len(wrong)} of {len(own)} weights." if len(wrong) > 1 else ".")
        )
    rest = {name: weight for name, weight in saved.items() if name not in {prefix + name for name in own}}
    classifiers = [name for name, weight in rest.items() if weight.shape == model.head.weight.shape]
    if len(classifiers) > 1:
        raise InputError(f"{path} has several weights that may be the classifier's: {', '.join(classifiers)}.")
    model.backbone.load_state_dict(found)
    with torch.no_grad():
        for name in classifiers:
            model.head.weight.copy_(rest.pop(name))
    taken = f"the backbone ({len(own)} weights)" + (f" and the classifier ({classifiers[0]})" if classifiers else "")
    kept = "" if classifiers else f" The head of {tuple(model.head.weight.shape)} begins at random."
    dropped = f" Dropped: {', '.join(rest)}." if rest else ""
    rank_zero_info(f"Warm start from {path}: took {taken}.{kept}{dropped}")
