"""Files are complete or absent, on a full disk and after a kill."""

import os
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import torch

from lsoftmax_lightning.atomic import atomic_path, remove_temporaries, temporary_path, torch_save, write_text

from .helpers.forked import run_on
from .helpers.training import file_size_limit


def killed_while_writing(path: str, folder: bool = False) -> None:
    with atomic_path(path) as temporary:
        if folder:
            temporary.mkdir()
            temporary = temporary / "inner"
        temporary.write_text("incomplete")
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_leaves_the_existing_file_and_no_temporary_file() -> None:
    write_text("out/file.txt", "old")
    with pytest.raises(ZeroDivisionError), atomic_path("out/file.txt") as temporary:
        temporary.write_text(f"new {1 / 0}")
    assert Path("out/file.txt").read_text() == "old"
    write_text("out/file.txt", "new")
    assert Path("out/file.txt").read_text() == "new"
    assert os.listdir("out") == ["file.txt"]


@pytest.mark.parametrize("folder", [False, True])
def test_the_next_writer_removes_the_temporary_file_of_a_killed_one(folder: bool) -> None:
    write_text("out/file.txt", "old")
    with temporary_path("out/file.txt") as active, temporary_path("out/other.txt") as other:
        active.touch()
        other.touch()
        assert run_on(1, partial(killed_while_writing, "out/file.txt", folder)).returncode == -signal.SIGKILL
        assert Path("out/file.txt").read_text() == "old"
        assert len(os.listdir("out")) == 4
        write_text("out/file.txt", "new")
        assert {path.name for path in Path("out").iterdir()} == {"file.txt", active.name, other.name}
    assert os.listdir("out") == ["file.txt"]


def test_temporary_files_of_live_processes_and_of_other_hosts_are_kept() -> None:
    names = [
        f".a.{socket.gethostname()}-{os.getppid()}-01234567.part",
        ".a.elsewhere-999999999-01234567.part",
        ".a.part",
    ]
    for name in names:
        Path(name).touch()
    write_text("a", "")
    remove_temporaries(Path("gone/a"))
    assert sorted(os.listdir()) == sorted(["a", *names])


def test_a_full_disk_is_an_error_that_names_the_file() -> None:
    write_text("out/file.txt", "old")
    with file_size_limit(100):
        with pytest.raises(OSError, match=r"File too large: 'out/file\.txt'$"):
            write_text("out/file.txt", "new" * 100)
        with pytest.raises(OSError, match=r"File too large: 'out/file\.txt'$"):
            torch_save({"weights": torch.zeros(100)}, "out/file.txt")
    assert Path("out/file.txt").read_text() == "old"
    assert os.listdir("out") == ["file.txt"]


def test_a_folder_without_write_permission_is_an_error_that_names_the_file() -> None:
    with pytest.raises(OSError, match=r"'/proc/file\.txt'"):
        write_text("/proc/file.txt", "text")
    Path("file").touch()
    with pytest.raises(OSError, match="'file'"):
        write_text("file/file.txt", "text")


def test_special_files_are_not_replaced() -> None:
    os.mkfifo("fifo")
    Path("null").symlink_to("/dev/null")
    for path in ("fifo", "null"):
        with pytest.raises(OSError, match=f"Not a regular file: '{path}'"):
            write_text(path, "text")
        assert not Path(path).is_file()
    assert sorted(os.listdir()) == ["fifo", "null"]
