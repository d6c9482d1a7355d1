"""Update the tables of docs/performance.md: each is between the command that prints it and an end marker.

Each table is written as soon as it is measured; all of them take an hour.

Usage: python benchmarks/performance.py [PART_OF_A_COMMAND ...]
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def main(*parts: str) -> None:
    """Run the commands that contain all these parts."""
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
