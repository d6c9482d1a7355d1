"""Handling of SIGINT (Ctrl-C) and SIGTERM (schedulers, containers): commands end with exit code 130 or 143."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEAT_SECONDS = 1.0  # a terminal or launcher may send a signal twice
_LAUNCHER_PID = "LSOFTMAX_LIGHTNING_LAUNCHER_PID"
_command: SignalHandler | None = None  # handler of the command running in this process


class Stopped(SystemExit):
    """The exit of a process after a signal.

    Args:
        signum: The signal. The exit code is 128 + ``signum``.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


class SignalHandler:
    """Call a function at the first signal, and end the process at the next one.

    A signal within a second after another one is ignored, because a terminal signals the whole process group and
    launchers repeat the signal. Forked processes, such as DataLoader workers, ignore the signals; the process that
    started them ends them.

    Args:
        function: Called with the signal in the main thread, between two Python instructions.

    Attributes:
        received: The first signal, or None.
    """

    latest = -_REPEAT_SECONDS

    def __init__(self, function: Callable[[signal.Signals], None]) -> None:
        self.received: signal.Signals | None = None
        self._function = function
        self._pid = os.getpid()

    def install(self) -> None:
        """Handle both signals; no effect outside the main thread, where Python does not allow handlers."""
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                signal.signal(signum, self)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal; called by Python."""
        now = time.monotonic()
        if os.getpid() != self._pid or now - SignalHandler.latest < _REPEAT_SECONDS:
            return
        SignalHandler.latest = now
        if self.received is None:
            self.received = signal.Signals(signum)
            self._function(self.received)
        else:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


def stop(signum: signal.Signals, seconds: int = 0) -> None:
    """End this process.

    A rank that Lightning launched passes the signal to the process that launched it, which ends all ranks.

    Args:
        signum: The signal.
        seconds: Seconds until the process is forced to exit, in case the exception left a lock of a library locked.
            Default: 0, no limit.

    Raises:
        SystemExit: Always.
    """
    is_launched = "LOCAL_RANK" in os.environ and os.environ.get(_LAUNCHER_PID) == str(os.getppid())
    code = 0 if is_launched else 128 + signum  # otherwise, Lightning would kill the launcher
    if _command is not None:
        _command.received = signum
        if seconds and sys.platform != "win32":
            signal.signal(signal.SIGALRM, lambda *args: os._exit(code))
            signal.alarm(seconds)
    if is_launched:
        os.kill(os.getppid(), signum)
        raise SystemExit(code)
    raise Stopped(signum)


def stop_if_received() -> None:
    """End this process if a signal arrived but a destructor, a callback or a library swallowed its exception."""
    if _command is not None and _command.received is not None:
        stop(_command.received)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise :class:`Stopped` in the block when a signal arrives; restore the handlers after the block."""
    global _command
    previous = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    show = sys.unraisablehook
    sys.unraisablehook = lambda error: None if isinstance(error.exc_value, SystemExit) else show(error)
    children = multiprocessing.active_children()
    outer, _command = _command, SignalHandler(stop)
    command = _command
    command.install()
    try:
        yield
        stop_if_received()
    finally:
        _command = outer
        sys.unraisablehook = show
        if threading.current_thread() is threading.main_thread():
            for signum, function in previous.items():
                signal.signal(signum, function)
        if command.received is not None:
            if sys.platform != "win32":
                signal.alarm(0)
            for process in multiprocessing.active_children():
                if process not in children:  # Python would wait for a worker that still runs
                    process.kill()
                    process.join()


def ignore_signals(worker_id: int = 0) -> None:
    """Ignore SIGINT and SIGTERM in a DataLoader worker; pass this function as ``worker_init_fn``.

    A scheduler signals the whole process group. If a worker ended first, the run could not finish the step before it
    saves its checkpoint. The run ends its workers itself.
    """
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Defer SIGINT and SIGTERM to the end of the block.

    Processes forked in the block inherit the blocked signals. torch lets SIGTERM end a new DataLoader worker until it
    calls :func:`ignore_signals`; a signal in between would end the worker.
    """
    if sys.platform == "win32":
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def mark_launcher() -> None:
    """Store the id of this process in the environment, for :func:`stop` in the ranks that Lightning launches."""
    if "LOCAL_RANK" not in os.environ:
        os.environ[_LAUNCHER_PID] = str(os.getpid())
