"""Programs in forked processes, because importing torch and Lightning takes longer than most tests."""

import multiprocessing.util
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import torch.distributed as dist


def torchrun(rank: int, count: int, port: int, nodes: int = 1) -> dict[str, object]:
    """Return the environment that torchrun sets."""
    node, local = divmod(rank, count // nodes)
    ranks = {"RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": node}
    sizes = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count // nodes}
    return ranks | sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}


def srun(rank: int, count: int, port: int, nodes: int = 1) -> dict[str, object]:
    """Return the environment that srun sets."""
    node, local = divmod(rank, count // nodes)
    ranks = {"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_NODEID": node}
    sizes = {"SLURM_NTASKS": count, "SLURM_NTASKS_PER_NODE": count // nodes}
    return (
        ranks | sizes | {"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_ID": 1, "SLURM_JOB_NAME": "x", "MASTER_PORT": port}
    )


def run_on(
    count: int,
    task: Callable[[], object],
    environment: Callable[[int, int, int], dict[str, object]] = torchrun,
    kill_others: bool = True,
) -> CompletedProcess[str]:
    """Run a task in several processes.

    Args:
        count: Number of processes.
        task: Called in each of them.
        environment: Environment variables of a process as a function of its rank, the count and a port.
        kill_others: Whether to kill the other processes, which may wait, when one fails.

    Returns:
        The output of all of them, and the exit code of the first that failed, or 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # unique names, because a task may call run_on in the same folder
    names = [[f"{stream}_{os.getpid()}_{rank}" for stream in ("stdout", "stderr")] for rank in range(count)]
    paths = [[Path(name).absolute() for name in pair] for pair in names]
    ranks = {fork(environment(rank, count, port), task, *paths[rank]): rank for rank in range(count)}
    failed = 0
    while ranks:
        pid, status = os.wait()
        if pid in ranks:
            del ranks[pid]
            failed = failed or os.waitstatus_to_exitcode(status)
            if failed and kill_others:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
    stdout, stderr = ("".join(pair[stream].read_text() for pair in paths) for stream in (0, 1))
    return CompletedProcess([], failed, stdout, stderr)


def launch(task: Callable[[], object], *args: str, program: ModuleType | None = None) -> CompletedProcess[str]:
    """Run a task as the program of a user, with the command line from which Lightning launches other ranks.

    Args:
        task: The program.
        args: Its arguments.
        program: The module that ``python -m`` runs; by default the file ``program.py``.
    """

    def start() -> None:
        sys.argv = ["program.py", *args]
        sys.modules["__main__"] = program or ModuleType("__main__")
        task()

    return run_on(1, start, lambda rank, count, port: {})


def show_warning(message: Warning | str, category: type[Warning], file: str, line: int, *args: object) -> None:
    """Write a warning to stderr, as Python does; pytest would record it in a list that is lost with the fork."""
    sys.stderr.write(warnings.formatwarning(message, category, file, line))


def fork(environment: dict[str, object], task: Callable[[], object], stdout: Path, stderr: Path) -> int:
    """Run a task in a fork, and return its process ID."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        # reset state that a new process does not have
        multiprocessing.util._run_after_forkers()  # otherwise tensors of workers go to the parent
        warnings.resetwarnings()
        # Python ignores these by default
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show_warning
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.path.insert(0, os.getcwd())
        os.environ |= {name: str(value) for name, value in environment.items()}
        task()
        if dist.is_initialized():
            dist.destroy_process_group()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
