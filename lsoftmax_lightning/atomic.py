"""Files that are complete or absent, whenever a process ends."""

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
_NAME_LENGTH = 50  # characters of the target's name in a part's name, which a file system limits
_active: set[str] = set()  # names of the parts that this process is writing


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move the file or folder there when the block ends without an error.

    The temporary name is unique, so that two writers never share it. Parts of killed writers are removed.

    Args:
        path: The file to write. An existing file is replaced; missing parent folders are created.

    Raises:
        OSError: If the file cannot be written, or ``path`` is a device, a FIFO or a socket. The existing file is
            unchanged, and the error names ``path``.
    """
    path = Path(path)
    with temporary_path(path) as part:
        yield part
        _sync(part)
        part.replace(path)


@contextmanager
def temporary_path(path: str | Path) -> Iterator[Path]:
    """Yield a unique path beside ``path`` for a file or folder, which is removed when the block ends.

    Parts of killed writers of ``path`` are removed. Missing parent folders are created.

    Raises:
        OSError: If nothing can be written there, as :func:`atomic_path`.
    """
    path = Path(path)
    part = path.with_name(f"{_prefix(path)}{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}.part")
    _active.add(part.name)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a move would replace /dev/null by a file
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(path)
        yield part
    except OSError as error:
        if error.errno and (error.filename is None or str(error.filename).startswith(str(part))):
            error.filename, error.filename2 = str(path), None  # a failed write names no file, a failed open the part
        raise
    finally:
        _active.discard(part.name)
        with suppress(OSError):  # the first error is the one to report
            _remove(part)


@contextmanager
def disk_errors(setting: str, path: Path) -> Iterator[None]:
    """Report a full or read-only disk as an error of the setting that names the file.

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
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_csv(path: str | Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file by :func:`atomic_path`, with the cells of :func:`csv_safe`."""
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(map(csv_safe, rows))


def csv_safe(row: Iterable[Any]) -> list[Any]:
    """Return the cells of a CSV row such that no spreadsheet takes a text for a formula.

    Texts that begin like a formula get a ``'`` in front, as OWASP recommends against CSV injection. Numbers, and texts
    that are numbers, do not change.

    Args:
        row: Cells; those that are not texts do not change.
    """
    return [f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell for cell in row]


def from_csv_safe(cell: str) -> str:
    """Return the text of a cell that :func:`csv_safe` wrote."""
    text = cell.removeprefix("'")
    return text if _is_formula(text) else cell


def _is_formula(text: str) -> bool:
    if not text.startswith(_FORMULA_STARTS):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def torch_save(content: object, path: str | Path) -> None:
    """Write by :func:`torch.save` and :func:`atomic_path`."""
    with atomic_path(path) as part:
        torch_save_part(content, part)


def torch_save_part(content: object, part: Path) -> None:
    """Write the part of :func:`atomic_path` by :func:`torch.save`, which may abort the process on a full disk."""
    with part.open("wb") as file:
        deferred = _DeferredErrorFile(file)
        torch.save(content, deferred)  # type: ignore[arg-type]  # it needs write and flush alone
        if deferred.error is not None:
            raise deferred.error


class _DeferredErrorFile:
    """A file whose errors are kept: raised inside :func:`torch.save`, one would abort the process."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except BaseException as error:  # of the disk, or of a signal
            self.error = error
        return len(data)

    def flush(self) -> None:
        try:
            if self.error is None:
                self.file.flush()
        except BaseException as error:
            self.error = error


def remove_parts(path: Path) -> None:
    """Remove what killed processes of this machine left of ``path``."""
    pattern = re.compile(re.escape(f"{_prefix(path)}{socket.gethostname()}-") + r"(\d+)-[0-9a-f]{8}\.part")
    if not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and entry.name not in _active and not _is_alive(int(match[1])):
            _remove(entry)


def _prefix(path: Path) -> str:
    return f".{path.name[:_NAME_LENGTH]}."


def _sync(part: Path) -> None:
    """Flush a file to the disk, so that a power failure after the move leaves no empty file."""
    if part.is_file():
        descriptor = os.open(part, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Return whether another process has this id; a restarted container reuses the id of its killed process."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True
