"""SIGINT (Ctrl-C) and SIGTERM (schedulers, containers): every command ends with exit code 130 or 143."""

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
_REPEAT_SECONDS = 1.0  # a terminal or launcher may deliver one request twice
_LAUNCHER_PID = "LSOFTMAX_LIGHTNING_LAUNCHER_PID"
_command: SignalHandler | None = None  # handler of the command that runs in this process


class Stopped(SystemExit):
    """A signal ended the process.

    Args:
        signum: The signal. The exit code is 128 + its number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


class SignalHandler:
    """Call a function at the first signal; at the next one, end the process at once.

    A signal within a second of another one is a repetition and is ignored, because a terminal signals the whole process
    group and launchers signal their processes again. Forked processes such as DataLoader workers ignore the signals;
    the process that started them ends them.

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
        """Handle both signals; does nothing outside the main thread, where Python allows no handler."""
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                signal.signal(signum, self)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal; Python calls it."""
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
        seconds: Seconds until the process exits at once, in case the exception left a lock of a library locked.
            Default: 0, for no limit.

    Raises:
        SystemExit: Always.
    """
    is_launched = "LOCAL_RANK" in os.environ and os.environ.get(_LAUNCHER_PID) == str(os.getppid())
    code = 0 if is_launched else 128 + signum  # with another code, Lightning would kill the process that launched it
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
    """End this process if a signal arrived: a destructor, a weakref callback or a library swallowed its exception."""
    if _command is not None and _command.received is not None:
        stop(_command.received)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise :class:`Stopped` in the block when a signal arrives, and restore the handlers after it."""
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
                if process not in children:  # a worker that still runs; Python would wait for it
                    process.kill()
                    process.join()


def ignore_signals(worker_id: int = 0) -> None:
    """Ignore SIGINT and SIGTERM in a DataLoader worker: pass it as ``worker_init_fn``.

    A scheduler signals the whole process group. A worker that ends first breaks the batch that the run needs to save
    its checkpoint; the run itself ends its workers.
    """
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Defer SIGINT and SIGTERM to the end of the block.

    Processes forked in it inherit the blocked signals. torch installs a handler in a DataLoader worker that ends it at
    SIGTERM, and calls :func:`ignore_signals` some time later: a signal in between would end the worker.
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
    """Store the id of this process in the environment of the ranks that Lightning launches, for :func:`stop`."""
    if "LOCAL_RANK" not in os.environ:
        os.environ[_LAUNCHER_PID] = str(os.getpid())
