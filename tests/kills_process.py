"""Commands of the package in forks of a process that has imported torch, and signals that stop them."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import importlib
import json
import multiprocessing.util
import os
import pickle
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

from lightning import Callback
from lightning.pytorch.utilities import rank_zero_only

from lsoftmax_lightning.__main__ import run as run_command_line
from lsoftmax_lightning.lightning_cli import LSoftmaxCLI

PATIENCE = 20.0
"""Maximum seconds of a command and its processes after a signal."""

_LIMIT = 120.0  # maximum seconds of a command without a signal
_WORKER = "lsoftmax_lightning.compare.worker"


@dataclass(frozen=True)
class Moment:
    """The moment of a signal.

    Args:
        kind: ``time`` after the start, a ``hook`` of callbacks, a ``file`` operation or a ``call`` of a function.
        name: Hook, audit event (``write``, ``rename``, ``remove``) or dotted name of the function.
        seconds: Time after the start, or delay after the event.
        count: Which occurrence of the event.
        stage: Stage of the Trainer at the hook, or pattern of the file's path.
        after: Whether to wait for the end of the call.
        worker: Index of the run of a comparison in whose process the event occurs; -1 for the command's process.
    """

    kind: str
    name: str = ""
    seconds: float = 0.0
    count: int = 1
    stage: str = ""
    after: bool = False
    worker: int = -1

    def __str__(self) -> str:
        if self.kind == "time":
            return f"{self.seconds:.3f} s after the start"
        delay = f" + {1000 * self.seconds:.1f} ms" if self.seconds else ""
        where = f" of run {self.worker}" if self.worker >= 0 else ""
        return f"{'after ' * self.after}{self.name} [{self.stage}] #{self.count}{where}{delay}"


@dataclass(frozen=True)
class Kill:
    """A signal.

    Args:
        number: The signal.
        target: ``process``, ``group`` (the process group), ``all`` (every process that the command started), ``rank 1``
            or ``worker``.
        moment: Moment at which it is sent.
    """

    number: Signals
    target: str
    moment: Moment

    def __str__(self) -> str:
        return f"{self.number.name} to {self.target}, {self.moment}"


@dataclass
class Outcome:
    """Outcome of a command.

    Args:
        codes: Exit code of each rank; None if it was killed at the end.
        started: Time of the start.
        began: Time at which the command line was called.
        struck: Time of the signal, None if it was not sent.
        ended: Time of the end.
        synchronous: Whether the process signalled itself within the event.
        timeline: Seconds after the start of the first occurrence of each hook.
        survivors: Processes that were alive when the command had ended.
    """

    codes: list[int | None] = field(default_factory=list)
    started: float = 0.0
    began: float = 0.0
    struck: float | None = None
    ended: float = 0.0
    synchronous: bool = False
    timeline: dict[str, float] = field(default_factory=dict)
    survivors: list[int] = field(default_factory=list)


def adopt_orphans() -> None:
    """Become the parent of processes whose parent died, so that they can be found."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def in_fork(task: Callable[[], Any]) -> Any:
    """Return the result of a task that runs in a fork, which leaves no state in this process."""
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result: Any = task()
        except BaseException:
            result = RuntimeError(traceback.format_exc())
        with os.fdopen(write, "wb") as file:
            pickle.dump(result, file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        content = file.read()
    os.waitpid(pid, 0)
    result = pickle.loads(content)
    if isinstance(result, RuntimeError):
        raise result
    return result


def descendants() -> list[int]:
    """Return the ids of all living processes below this one."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def still_alive(pids: Sequence[int]) -> list[int]:
    """Return the processes that are alive; reap orphans that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    below = set(descendants())
    return [pid for pid in pids if pid in below]


def run(args: Sequence[str], folder: Path, log: str, ranks: int = 1, kill: Kill | None = None) -> Outcome:
    """Run a command in a process group of its own until it ends.

    Args:
        args: Arguments of the command line.
        folder: Working directory.
        log: Name of the files of stdout and stderr, ``<log>.<rank>.out`` and ``.err``, beside the folder.
        ranks: Number of processes, which get the environment of torchrun.
        kill: The signal to send.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    os.set_blocking(read, False)
    port = _free_port()
    outcome = Outcome(started=time.time())
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.close(read)
            environment = _torchrun(rank, ranks, port) if ranks > 1 else {}
            _child(args, folder, folder.with_name(f"{log}.{rank}"), environment, pids[0] if pids else 0, write, kill)
        pids.append(pid)
        with suppress(OSError):
            os.setpgid(pid, pids[0])
    os.close(write)
    _watch(pids, read, kill, outcome)
    os.close(read)
    outcome.ended = time.time()
    outcome.survivors = still_alive(descendants())
    return outcome


def _watch(pids: list[int], read: int, kill: Kill | None, outcome: Outcome) -> None:
    """Follow the processes, send the signal and fill in the outcome."""
    outcome.codes = [None] * len(pids)
    alive = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids)}
    send_at = outcome.started + kill.moment.seconds if kill and kill.moment.kind == "time" else None
    source = pids[1] if kill and kill.target == "rank 1" else pids[0]
    deadline = outcome.started + _LIMIT
    aborted = False
    text = b""
    pipe = [read]
    while alive:
        now = time.time()
        if send_at is not None and kill and now >= send_at:
            send_at = None
            if _send(kill, source, pids[0], alive):
                outcome.struck = time.time()
                deadline = outcome.struck + PATIENCE
        if now >= deadline:
            for rank in alive.values():  # SIGABRT first, for stack traces
                os.kill(pids[rank], signal.SIGKILL if aborted else signal.SIGABRT)
            aborted, deadline = True, now + 2
        until = deadline if send_at is None else min(deadline, send_at)
        ready, _, _ = select.select([*pipe, *alive], [], [], max(0.0, until - time.time()))
        if read in ready:
            chunk = os.read(read, 2**16)
            if not chunk:
                pipe = []
            *lines, text = (text + chunk).split(b"\n")
            for message in map(json.loads, lines):
                if "hook" in message:
                    outcome.timeline.setdefault(message["hook"], message["time"] - outcome.started)
                elif "began" in message:
                    outcome.began = max(outcome.began, message["began"])
                elif kill and message["sent"]:
                    outcome.struck, outcome.synchronous = message["struck"], True
                    deadline = outcome.struck + PATIENCE
                elif kill:
                    source = message["pid"]
                    send_at = message["struck"] + kill.moment.seconds
        for descriptor in [descriptor for descriptor in ready if descriptor in alive]:
            rank = alive.pop(descriptor)
            os.close(descriptor)
            code = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
            outcome.codes[rank] = None if aborted else code


def _send(kill: Kill, pid: int, group: int, alive: dict[int, int]) -> bool:
    """Send the signal; return whether a process received it."""
    if all(select.select([descriptor], [], [], 0)[0] for descriptor in alive):
        return False
    pids = {"group": [-group], "all": descendants()}.get(kill.target, [pid])
    sent = False
    for each in pids:
        with suppress(ProcessLookupError):
            os.kill(each, kill.number)
            sent = True
    return sent


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment that torchrun sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kills"}
    return {name: str(value) for name, value in values.items()}


def _child(
    args: Sequence[str],
    folder: Path,
    log: Path,
    environment: dict[str, str],
    group: int,
    control: int,
    kill: Kill | None,
) -> None:
    """Become a process that has just imported the package, run the command and end."""
    try:
        os.setpgid(0, group)
        os.chdir(folder)
        _redirect(log.with_name(f"{log.name}.out"), log.with_name(f"{log.name}.err"))
        os.environ.update(environment)
        rank_zero_only.rank = int(environment.get("RANK", 0))
        _forget_parent()
        sys.argv = ["lsoftmax_lightning", *args]
        trigger = _Trigger(kill, control)
        if args[0] == "compare":
            _substitute_workers(2, kill, control)
        if kill is None or (kill.moment.worker < 0 and (kill.target == "rank 1") == (rank_zero_only.rank == 1)):
            trigger.install()
        trigger.tell(began=time.time())
    except BaseException:
        traceback.print_exc()
        os._exit(99)
    _end(_exit_code(run_command_line))


def _forget_parent() -> None:
    """Reset state that a fork inherits and a new process does not have."""
    multiprocessing.util._run_after_forkers()  # type: ignore[attr-defined]
    warnings.resetwarnings()
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()


def _redirect(stdout: Path | str, stderr: Path | str) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)


def _exit_code(task: Callable[[], object]) -> int:
    """Return the exit code of Python; the negative number of the signal if a signal kills it."""
    try:
        task()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """End as the interpreter does: threads, then exit functions, then the streams."""

    def finish() -> None:
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        atexit._run_exitfuncs()

    try:
        changed = _exit_code(finish)
        code = changed or code
        sys.stdout.flush()
        sys.stderr.flush()
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
    finally:
        os._exit(code)


class _Trigger:
    """Send the signal, or let the parent send it, when the event occurs in this process."""

    def __init__(self, kill: Kill | None, control: int) -> None:
        self.kill, self.control, self.pid = kill, control, os.getpid()
        self.moment = kill.moment if kill else Moment("")
        self.remaining = self.moment.count
        self.seen: set[str] = set()

    def tell(self, **message: Any) -> None:
        """Write a line to the parent."""
        with suppress(BrokenPipeError):
            os.write(self.control, json.dumps(message).encode() + b"\n")

    def install(self) -> None:
        """Watch for the event."""
        if self.kill is None or self.moment.kind == "hook":
            _add_callback(_observer(self.at_hook))
        elif self.moment.kind == "file":
            sys.addaudithook(self.at_audit)
        elif self.moment.kind == "call":
            _wrap(self.moment.name, self.reach, self.moment.after)

    def at_hook(self, name: str, trainer: Any) -> None:
        """Note or compare a hook of callbacks."""
        stage = trainer.state.stage.value if trainer.state.stage else ""
        if self.kill is None:
            if (event := f"{name} {stage}") not in self.seen:
                self.seen.add(event)
                self.tell(hook=event, time=time.time())
        elif name == self.moment.name and stage.startswith(self.moment.stage):
            self.reach()

    def at_audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Compare an event of Python's audit hooks."""
        if event == "open":
            path, mode, flags = args
            found = "write" if flags & (os.O_WRONLY | os.O_RDWR) or re.search("[wax+]", mode or "") else "read"
        elif event in ("os.rename", "os.remove"):
            path, found = args[event == "os.rename"], event.removeprefix("os.")
        else:
            return
        if found != self.moment.name or not isinstance(path, str | os.PathLike):
            return
        if re.search(self.moment.stage, os.fspath(path)):
            self.reach()

    def reach(self) -> None:
        """Count an occurrence of the event; at the right one, send the signal."""
        if self.kill is None or os.getpid() != self.pid:  # a fork of this process
            return
        self.remaining -= 1
        if self.remaining:
            return
        now = not self.moment.seconds and self.kill.target != "all"
        pid = os.getppid() if self.moment.worker >= 0 and self.kill.target == "process" else self.pid
        self.tell(struck=time.time(), pid=pid, sent=now)
        if now and self.kill.target == "group":
            os.killpg(0, self.kill.number)
        elif now:
            os.kill(pid, self.kill.number)


def _observer(reach: Callable[[str, Any], None]) -> Callback:
    """Return a callback that reports all its hooks."""

    def hook(name: str) -> Callable[..., None]:
        def method(self: Callback, trainer: Any, *args: Any, **kwargs: Any) -> None:
            reach(name, trainer)

        return method

    names = [name for name in dir(Callback) if name.startswith("on_")] + ["setup", "teardown"]
    observer: Callback = type("Observer", (Callback,), {name: hook(name) for name in names})()
    return observer


def _add_callback(callback: Callback) -> None:
    original = LSoftmaxCLI.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs | {"callbacks": [*kwargs.get("callbacks", ()), callback]})

    LSoftmaxCLI.__init__ = init  # type: ignore[method-assign]


def _wrap(name: str, reach: Callable[[], None], after: bool) -> None:
    """Report the calls of a function, before or after."""
    module, _, attribute = name.rpartition(".")
    owner = importlib.import_module(module)
    original = getattr(owner, attribute)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not after:
            reach()
        result = original(*args, **kwargs)
        if after:
            reach()
        return result

    setattr(owner, attribute, wrapper)


class _Worker:
    """Worker of a comparison, which replaces its ``Popen``: a process that was forked before the command."""

    def __init__(self, index: int, others: list[int], kill: Kill | None, control: int) -> None:
        self.returncode: int | None = None
        read, self.write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(read)
            return
        for descriptor in (self.write, *others):
            os.close(descriptor)
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):  # until the start it must not react
                signal.signal(number, signal.SIG_IGN)
            with os.fdopen(read) as file:
                order = json.loads(file.read() or "null")
            if order is None:
                os._exit(0)
            _forget_parent()
            _redirect(order["log"], order["log"])
            os.environ.clear()
            os.environ.update(order["environment"])
            sys.argv = order["args"]
            if kill is not None and kill.moment.worker == index:
                _Trigger(kill, control).install()
            else:
                os.close(control)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        _end(_exit_code(lambda: runpy.run_module(_WORKER, run_name="__main__", alter_sys=True)))

    def start(self, args: list[str], environment: dict[str, str], log: str) -> None:
        """Let the process run as a new one."""
        with os.fdopen(self.write, "w") as file:
            json.dump({"args": args, "environment": environment, "log": log}, file)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end."""
        end = time.monotonic() + (timeout or 3600)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(_WORKER, timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _substitute_workers(count: int, kill: Kill | None, control: int) -> None:
    """Replace the first runs of a comparison by forks; start other processes as usual."""
    workers: list[_Worker] = []
    for index in range(count):
        workers.append(_Worker(index, [worker.write for worker in workers], kill, control))
    popen = subprocess.Popen

    def start(args: Any, *rest: Any, **kwargs: Any) -> Any:
        if not workers or list(args[1:3]) != ["-m", _WORKER]:
            return popen(args, *rest, **kwargs)
        worker = workers.pop(0)
        log = os.readlink(f"/proc/self/fd/{kwargs['stdout'].fileno()}")
        worker.start(args[2:], dict(kwargs.get("env") or os.environ), log)
        return worker

    subprocess.Popen = start  # type: ignore[assignment, misc]


@contextmanager
def ending(pids: Sequence[int]) -> Iterator[None]:
    """Kill the processes that are still alive at the end."""
    try:
        yield
    finally:
        for pid in still_alive(pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
