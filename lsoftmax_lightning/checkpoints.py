"""Checkpoints that are whole, safe to load, and of use to a network other than their own."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from .atomic import torch_save, write_text
from .compat import refused_code
from .data_spec import DataSpec
from .errors import InputError, RunError, first_line

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
        try:
            torch_save(checkpoint, path)
        except OSError as error:
            raise RunError(
                f"the checkpoint {path} could not be written: {error.strerror}. The previous checkpoint is unchanged; "
                "free some space and continue from it with --ckpt_path."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, or bare weights, as :func:`read` does, on the CPU, whatever the other arguments are.

        Lightning reads a checkpoint at a URL with ``weights_only=False``, which runs code in it.
        """
        return _read_content(path)


def stamp(checkpoint: dict[str, Any], data_spec: DataSpec | None = None) -> None:
    """Notes in a checkpoint by which release and in which format it is written, and what data it was trained on.

    Args:
        checkpoint: As a module's ``on_save_checkpoint`` is given it.
        data_spec: Specification of the training data, if it is known.
    """
    checkpoint[_KEY] = {"format": FORMAT, "version": version("lsoftmax-lightning")}
    if data_spec is not None:
        checkpoint[_KEY]["data"] = data_spec.to_json()


def saved_data_spec(checkpoint: dict[str, Any]) -> DataSpec | None:
    """Return the specification of the data that a checkpoint was trained on; None if it does not have one.

    Args:
        checkpoint: As it was loaded.

    Raises:
        InputError: If the specification is damaged.
    """
    text = checkpoint.get(_KEY, {}).get("data")
    return None if text is None else DataSpec.from_json(text)


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


@contextmanager
def local_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of a local file: ``path`` itself, or the downloaded copy of a URL.

    Args:
        path: A path, or a URL of any protocol that fsspec knows, such as ``https://`` or ``s3://``.

    Raises:
        InputError: If there is no such file.
    """
    if "://" not in str(path):
        if not Path(path).is_file():
            raise InputError(f"there is no file {path}; an example is runs/digits/version_0/checkpoints/last.ckpt.")
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "remote.ckpt")
        try:
            get_filesystem(path).get_file(str(path), str(copy))
        except Exception as error:  # of any file system and network library
            raise InputError(f"{path} cannot be downloaded: {error or type(error).__name__}") from error
        yield copy


def read(path: str | Path) -> dict[str, Any]:
    """Read a file of weights from an untrusted source: no code in it is run, and damage is found.

    Args:
        path: A path or URL of a checkpoint of Lightning, or of a state dict that :func:`torch.save` wrote.

    Returns:
        Its content, always with ``state_dict``.

    Raises:
        InputError: If the file is missing, damaged, unsafe, or something else.
    """
    content = _read_content(path)
    return content if "state_dict" in content else {"state_dict": content}


def _read_content(path: str | Path) -> dict[str, Any]:
    """Read the dict in a file: a checkpoint, or a state dict."""
    with local_file(path) as file:
        content: Any = _load(path, file)
    weights = content["state_dict"] if isinstance(content, dict) and "state_dict" in content else content
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise InputError(f"{path} has no state_dict, or one that has more than tensors in it.")
    check_format(content)
    return content  # type: ignore[no-any-return]


def _load(path: str | Path, file: Path) -> Any:
    """Load ``file``, called ``path`` in messages."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            damaged = archive.testzip()  # torch itself does not look at the checksums
        # torch maps the bytes of an entry, compressed or not, and takes the first of two entries of one name
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries)
        if damaged is None and (not stored or len({e.filename for e in entries}) < len(entries)):
            raise InputError(
                f"{path} was repacked: torch.save writes no compressed files. Use the original checkpoint."
            )
        content = None if damaged else torch.load(file, "cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except UnpicklingError as error:
        code = refused_code(error)
        raise InputError(
            f"{path} is refused: it holds more than weights and plain values, and to load it would run code"
            + (f" ({code})." if code else ".")
        ) from error
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is not a complete checkpoint: torch.save writes a complete zip file.") from error
    except Exception as error:  # whatever a decoder meets in a damaged file
        raise InputError(f"{path} is damaged: {first_line(error)}") from error
    if damaged:
        raise InputError(f"{path} is damaged: {damaged} in it is not what was written.")
    return content


_INDEX = "index.json"  # beside the checkpoints of a run


def update_index(folder: str | Path, **names: str) -> None:
    """Write which files in a folder of checkpoints are the best and the last.

    Args:
        folder: The folder. Its index holds names only, so the folder can be moved.
        **names: File names by ``best`` and ``last``. The other entry is kept.
    """
    write_text(Path(folder, _INDEX), json.dumps(_index(folder) | names) + "\n")


def indexed(folder: str | Path, word: str) -> Path:
    """Return the path of the ``best`` or ``last`` checkpoint in a folder, by its index; the file may be missing.

    Args:
        folder: The folder of checkpoints of a run.
        word: ``best`` or ``last``.
    """
    return Path(folder, PurePath(_index(folder).get(word, f"{word}.ckpt")).name)


def _index(folder: str | Path) -> dict[str, str]:
    try:
        names: dict[str, str] = json.loads(Path(folder, _INDEX).read_text())
    except (FileNotFoundError, ValueError):  # of an earlier release, or edited by hand
        return {}
    return names


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
