"""Checkpoints: atomic writing, safe reading, and warm start from other weights."""

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
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from .atomic import torch_save, write_text
from .data_spec import DataSpec
from .errors import InputError, RunError, first_line
from .library_messages import refused_code

FORMAT = 1
"""Format of the checkpoints that are written. A checkpoint without a format has format 0."""

_KEY = "lsoftmax_lightning"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file beside its path, and move it to the path when it is complete.

    If a run is killed or the disk is full during the write, the previous checkpoint is unchanged. Lightning writes to
    the system's temporary folder instead; if that is on another disk, the move is a copy and not atomic.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Content of the checkpoint.
            path: Path of the file, or a URL, to which Lightning's own class writes.
            storage_options: As for :class:`lightning.fabric.plugins.io.TorchCheckpointIO`.

        Raises:
            RunError: If the file cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            torch_save(checkpoint, path)
        except OSError as error:
            raise RunError(
                f"the checkpoint {path} could not be written: {error.strerror}. The previous checkpoint is unchanged; "
                "free some space and resume from it with --ckpt_path."
            ) from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint or a state dict to the CPU, as :func:`read` does. The other arguments have no effect.

        Lightning would read a checkpoint at a URL with ``weights_only=False``, which runs code in it.
        """
        return _read_content(path)


WholeCheckpointIO = AtomicCheckpointIO  # the name in config.yaml files of earlier releases


def stamp(checkpoint: dict[str, Any], data_spec: DataSpec | None = None) -> None:
    """Add the release, the format and the specification of the training data to a checkpoint.

    Args:
        checkpoint: The checkpoint, as passed to ``on_save_checkpoint``. It is changed in place.
        data_spec: Specification of the training data, if it is known.
    """
    checkpoint[_KEY] = {"format": FORMAT, "version": version("lsoftmax-lightning")}
    if data_spec is not None:
        checkpoint[_KEY]["data"] = data_spec.to_json()


def saved_data_spec(checkpoint: dict[str, Any]) -> DataSpec | None:
    """Return the specification of the training data in a checkpoint; None if there is none.

    Args:
        checkpoint: A loaded checkpoint.

    Raises:
        InputError: If the specification is damaged.
    """
    text = checkpoint.get(_KEY, {}).get("data")
    return None if text is None else DataSpec.from_json(text)


def check_format(checkpoint: dict[str, Any]) -> None:
    """Reject a checkpoint whose format is newer than this release.

    Args:
        checkpoint: A loaded checkpoint.

    Raises:
        InputError: If the format is newer.
    """
    stamped = checkpoint.get(_KEY, {"format": 0})
    if stamped["format"] > FORMAT:
        raise InputError(
            f"the checkpoint has format {stamped['format']}, written by lsoftmax-lightning {stamped['version']}, but "
            f"{version('lsoftmax-lightning')} reads formats up to {FORMAT}; upgrade lsoftmax-lightning."
        )


@contextmanager
def local_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of a local file: ``path`` itself, or the downloaded copy of a URL.

    Args:
        path: A path, or a URL of any protocol that fsspec supports, such as ``https://`` or ``s3://``.

    Raises:
        InputError: If the file does not exist or cannot be downloaded.
    """
    if "://" not in str(path):
        if not Path(path).is_file():
            raise InputError(
                f"{path} does not exist, or is not a file such as runs/digits/m4-s0/checkpoints/last.ckpt."
            )
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "remote.ckpt")
        try:
            get_filesystem(path).get_file(str(path), str(copy))
        except Exception as error:  # each file system and network library has its own exceptions
            raise InputError(f"{path} cannot be downloaded: {error or type(error).__name__}") from error
        yield copy


def read(path: str | Path) -> dict[str, Any]:
    """Read a file of weights from an untrusted source: detect damage, and run no code in it.

    Args:
        path: Path or URL of a Lightning checkpoint, or of a state dict written by :func:`torch.save`.

    Returns:
        Content of the file. It always has the key ``state_dict``.

    Raises:
        InputError: If the file is missing, damaged or unsafe, or contains no weights.
    """
    content = _read_content(path)
    return content if "state_dict" in content else {"state_dict": content}


def _read_content(path: str | Path) -> dict[str, Any]:
    """Read the dict in a file: a checkpoint, or a state dict."""
    with local_file(path) as file:
        content: Any = _load(path, file)
    weights = content["state_dict"] if isinstance(content, dict) and "state_dict" in content else content
    # get_extra_state of a module may return anything; torch.load rejects what is not safe
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(w, Tensor) or str(name).endswith("_extra_state") for name, w in weights.items())
    ):
        raise InputError(
            f"{path} must contain a state_dict of tensors only; use a checkpoint or a state dict of torch.save."
        )
    check_format(content)
    return content  # type: ignore[no-any-return]


def _load(path: str | Path, file: Path) -> Any:
    """Load a file; messages show ``path``, which may be the URL of a downloaded file."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            damaged = archive.testzip()  # torch does not check the checksums
        # torch maps the bytes of an entry, compressed or not, and reads the first of two entries with the same name
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries)
        if damaged is None and (not stored or len({e.filename for e in entries}) < len(entries)):
            raise InputError(
                f"{path} was repacked, since torch.save does not compress files; use the original checkpoint."
            )
        content = None if damaged else torch.load(file, "cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except UnpicklingError as error:
        code = refused_code(error)
        raise InputError(
            f"{path} contains more than weights and plain values: loading it would run code"
            + (f" ({code})." if code else ".")
        ) from error
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path} is not a complete checkpoint: it is not a valid zip file, which torch.save writes."
        ) from error
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise InputError(f"{path} is damaged: {first_line(error)}") from error
    if damaged:
        raise InputError(f"{path} is damaged: the checksum of {damaged} is wrong.")
    return content


_INDEX = "index.json"  # file name, beside the checkpoints of a run


def update_index(folder: str | Path, **names: str) -> None:
    """Write the names of the best and the last checkpoint to the index of their folder.

    Args:
        folder: The folder. Its index contains file names without folders, so the folder can be moved.
        **names: File name of ``best`` or ``last``. The entry that is not given is kept.
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
        names: dict[str, str] = json.loads(Path(folder, _INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # written by an earlier release, or edited by hand
        return {}
    return names


def warm_start(model: Any, path: str | Path) -> None:
    """Load the weights of a network that was trained with plain softmax, and log which weights were loaded.

    Prefixes of the parameter names, as Lightning, DDP and ``torch.compile`` add them, are ignored. A weight that is not
    of the backbone and has the shape of the head's weight is loaded into the head. Without one, the head keeps its
    random weight, with a warning. The bias of the classifier is dropped, because L-Softmax has none.

    Args:
        model: Module with a ``backbone`` and a ``head``.
        path: Path or URL of a Lightning checkpoint, or of the state dict of a bare module.

    Raises:
        InputError: If the file cannot be read, contains another backbone, or contains several weights with the shape of
            the head's weight.
    """
    saved: dict[str, Any] = read(path)["state_dict"]
    backbone = model.backbone.state_dict()
    # the prefix of the names in the file is the one that matches most weights
    prefixes = Counter(key.removesuffix(name) for key in saved for name in backbone if f".{key}".endswith(f".{name}"))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    loaded = {name: saved[prefix + name] for name in backbone if prefix + name in saved}
    wrong = [name for name, weight in backbone.items() if name not in loaded or _shape(loaded[name]) != _shape(weight)]
    if wrong:
        name = wrong[0]
        found = f"shape {_shape(loaded[name])}" if name in loaded else "no weight"
        raise InputError(
            f"warm_start: {path} must contain the weights of this backbone, got {found} for {name} of shape "
            f"{_shape(backbone[name])}"
            + (f" and a mismatch for {len(wrong)} of {len(backbone)} weights" if len(wrong) > 1 else "")
            + "; set the backbone to that of the file."
        )
    others = {name: weight for name, weight in saved.items() if name not in {prefix + name for name in backbone}}
    classifiers = [name for name, weight in others.items() if _shape(weight) == _shape(model.head.weight)]
    if len(classifiers) > 1:
        raise InputError(
            f"warm_start: {path} must contain one weight with the shape of the head's weight, got several: "
            f"{', '.join(classifiers)}; remove all but that of the classifier from the file."
        )
    model.backbone.load_state_dict(loaded)
    with torch.no_grad():
        for name in classifiers:
            model.head.weight.copy_(others.pop(name))
    names = f"the backbone ({len(backbone)} weights)"
    names += f" and the classifier ({classifiers[0]})" if classifiers else ""
    initialized = "" if classifiers else f" The head of shape {tuple(model.head.weight.shape)} is randomly initialised."
    dropped = f" Dropped: {', '.join(others)}." if others else ""
    report = rank_zero_info if classifiers else rank_zero_warn
    report(f"Warm start from {path}: loaded {names}.{initialized}{dropped}")


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a weight; None for the extra state of a module."""
    return tuple(value.shape) if isinstance(value, Tensor) else None
