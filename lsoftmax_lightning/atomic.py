"""Atomic writing: after a crash, a file is either complete or unchanged."""

from __future__ import annotations

import csv
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch

from .errors import RunError

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
_NAME_LENGTH = 50  # characters of the name in a temporary name, because file systems limit its length
_active: set[str] = set()  # temporary names in use by this process


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and move it to ``path`` when the block ends without an error.

    The temporary name is unique to a writer. Temporary files of killed writers are removed.

    Args:
        path: The file to write. An existing file is replaced; missing parent folders are created.

    Raises:
        OSError: If the file cannot be written, or ``path`` is a device, a FIFO or a socket. The existing file is
            unchanged, and the error names ``path``.
    """
    path = Path(path)
    with temporary_path(path) as temporary:
        yield temporary
        _sync(temporary)
        temporary.replace(path)


@contextmanager
def temporary_path(path: str | Path) -> Iterator[Path]:
    """Yield a unique path beside ``path`` for a file or folder, and remove it when the block ends.

    Temporary files of killed writers of ``path`` are removed. Missing parent folders are created.

    Raises:
        OSError: As in :func:`atomic_path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{_prefix(path)}{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}.part")
    _active.add(temporary.name)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a move would replace /dev/null by a file
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(path)
        yield temporary
    except OSError as error:
        if error.errno and (error.filename is None or str(error.filename).startswith(str(temporary))):
            # the error of a write has no file name, the error of an open has the temporary one
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        _active.discard(temporary.name)
        with suppress(OSError):  # report the first error only
            _remove(temporary)


@contextmanager
def disk_errors(setting: str, path: Path) -> Iterator[None]:
    """Report a full or read-only disk as an error that names the setting and the file.

    Args:
        setting: Name of the setting, such as ``output``.
        path: File that the block writes.

    Raises:
        RunError: For an OSError in the block.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{setting}: {path} cannot be written ({error.strerror or error}); free some space or choose another file."
        ) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file by :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: str | Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file by :func:`atomic_path`, with cells escaped by :func:`csv_safe`."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(map(csv_safe, rows))


def csv_safe(row: Iterable[Any]) -> list[Any]:
    """Return the cells of a CSV row with formulas escaped, so that a spreadsheet does not run them.

    A string that begins like a formula is prefixed with ``'``, as OWASP recommends against CSV injection. Numbers, and
    strings that are numbers, do not change.

    Args:
        row: Cells of the row.

    Example:
        >>> from lsoftmax_lightning.atomic import csv_safe
        >>> csv_safe(["=1+1", "-2.5", 3])
        ["'=1+1", '-2.5', 3]
    """
    return [f"'{cell}" if isinstance(cell, str) and _is_formula(cell.lstrip("'")) else cell for cell in row]


def from_csv_safe(cell: str) -> str:
    """Return the original string of a cell escaped by :func:`csv_safe`."""
    text = cell.removeprefix("'")
    return text if _is_formula(text.lstrip("'")) else cell


def _is_formula(text: str) -> bool:
    if not text.startswith(_FORMULA_STARTS):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def torch_save(content: object, path: str | Path) -> None:
    """Write a file by :func:`torch.save` and :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        torch_save_temporary(content, temporary)


def torch_save_temporary(content: object, temporary: Path) -> None:
    """Write the temporary file of :func:`atomic_path` by :func:`torch.save`.

    On a full disk, :func:`torch.save` itself may abort the process.

    Raises:
        OSError: If the file cannot be written.
    """
    with temporary.open("wb") as file:
        deferred = _DeferredErrorFile(file)
        torch.save(content, deferred)  # type: ignore[arg-type]  # it needs only write and flush
        if deferred.error is not None:
            raise deferred.error


class _DeferredErrorFile:
    """File that stores its first error, because an error inside :func:`torch.save` may abort the process."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except BaseException as error:  # a full disk, or a signal
            self.error = error
        return len(data)

    def flush(self) -> None:
        try:
            if self.error is None:
                self.file.flush()
        except BaseException as error:
            self.error = error


def remove_temporaries(path: Path) -> None:
    """Remove temporary files of ``path`` from killed processes of this machine."""
    pattern = re.compile(re.escape(f"{_prefix(path)}{socket.gethostname()}-") + r"(\d+)-[0-9a-f]{8}\.part")
    if not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and entry.name not in _active and not _is_alive(int(match[1])):
            _remove(entry)


def _prefix(path: Path) -> str:
    return f".{path.name[:_NAME_LENGTH]}."


def _sync(temporary: Path) -> None:
    """Flush a file to the disk, so that a power failure after the move leaves no empty file."""
    if temporary.is_file():
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(temporary: Path) -> None:
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Return whether another process has this id; a restarted container may reuse the id of the killed process."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True
