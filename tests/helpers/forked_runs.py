"""Runs of a comparison in forked processes, because importing torch and Lightning takes longer than a short run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from lsoftmax_lightning.compare import worker

from .forked import fork


class ForkedRun:
    """Replacement for ``subprocess.Popen``: a fork with the same folder, environment, log and session."""

    def __init__(self, args: list[str], stdout: IO[bytes], env: dict[str, str], **kwargs: Any) -> None:
        assert args[:3] == [sys.executable, "-m", worker.__name__]
        assert kwargs == {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
        self.returncode: int | None = None

        def run() -> None:
            os.setsid()
            for descriptor in (1, 2):
                os.dup2(stdout.fileno(), descriptor)
            os.environ.clear()
            os.environ.update(env)
            sys.modules["__main__"], sys.argv = worker, args[2:]  # Lightning starts other ranks with these
            worker.main(args[3], int(args[4]))

        self.pid = fork({}, run, Path(os.devnull), Path(os.devnull))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("run", timeout)
            time.sleep(0.02)
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


@pytest.fixture
def forked_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the runs of comparisons in forks."""
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
    forking = SimpleNamespace(Popen=ForkedRun, **names)  # libraries use the real module
    monkeypatch.setattr("lsoftmax_lightning.compare.training.subprocess", forking)
