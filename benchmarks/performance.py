"""Writes the tables of docs/performance.md anew: each stands between a command that makes it and an end.

A table is on the page as soon as it is made: all of them take an hour.

Usage: python benchmarks/performance.py [PART OF A COMMAND]
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def main(*parts: str) -> None:
    """Runs the commands that have these parts."""
    for command in re.findall(r"```sh\n(python benchmarks/[^\n]*)\n```", PAGE.read_text()):
        if not all(part in command for part in parts):
            continue
        print(command, flush=True)
        arguments = [sys.executable if word == "python" else word for word in command.split()]
        done = subprocess.run(arguments, cwd=PAGE.parent.parent, check=True, stdout=subprocess.PIPE, text=True)
        before, begin, rest = PAGE.read_text().partition(f"```sh\n{command}\n```\n")
        PAGE.write_text(f"{before}{begin}\n{done.stdout.strip()}\n\n{rest[rest.index('<!-- end -->') :]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
