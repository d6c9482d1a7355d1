"""Seconds from the start of Python to its end for imports and for commands that only print.

Each round runs each of them once in a new process. The first round fills the file cache and is not counted.

Usage: python benchmarks/startup.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import machine, table

IMPORTS = ("torch", "lightning", "lsoftmax_lightning", "lsoftmax_lightning.heads")
COMMANDS = (
    "--version",
    "--help",
    "configs",
    "fiet",
    "fit --help",
    "fit --full_help",
    "fit --config digits.yaml --print_config",
)


def seconds(arguments: list[str]) -> float:
    """Run Python with arguments and return its seconds."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if "Traceback" in done.stderr:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - start


def main(rounds: int = 5) -> None:
    """Print the table."""
    jobs = {f"`import {name}`": ["-c", f"import {name}"] for name in IMPORTS}
    jobs |= {f"`lsoftmax_lightning {line}`": ["-m", "lsoftmax_lightning", *line.split()] for line in COMMANDS}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(-1, rounds):
        for name, arguments in jobs.items():
            duration = seconds(arguments)
            if round_ >= 0:
                times[name].append(duration)
    medians = {name: statistics.median(durations) for name, durations in times.items()}
    rows = [
        [
            name,
            f"{median:.2f}",
            f"{min(times[name]):.2f} .. {max(times[name]):.2f}",
            f"{median / medians['`import torch`']:.2f}",
            f"{median / medians['`import lightning`']:.2f}",
        ]
        for name, median in medians.items()
    ]
    print(f"{machine()}.\n")
    header = ["", f"seconds, median of {rounds}", "least .. most", "to `import torch`", "to `import lightning`"]
    print(table(header, rows))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
