"""Files that are complete or absent, whenever a process ends."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_NAME_LENGTH = 50  # characters of the target's name in a part's name, which a file system limits
_active: set[str] = set()  # names of the parts that this process is writing


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move the file or folder there when the block ends without an error.

    The temporary name is unique, so that two writers never share it. Parts of killed writers are removed.

    Args:
        path: The file to write. An existing file is replaced; missing parent folders are created.

    Raises:
        OSError: If the file cannot be written. The existing file is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path)
    part = path.with_name(f"{_prefix(path)}{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}.part")
    _active.add(part.name)
    try:
        yield part
        _sync(part)
        part.replace(path)
    finally:
        _remove(part)
        _active.discard(part.name)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file by :func:`atomic_path`."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def remove_parts(path: Path) -> None:
    """Remove what killed processes of this machine left of ``path``."""
    pattern = re.compile(re.escape(f"{_prefix(path)}{socket.gethostname()}-") + r"(\d+)-[0-9a-f]{8}\.part")
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
