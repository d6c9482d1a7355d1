"""Writes the tables of docs/performance.md anew: each stands between a command that makes it and an end.

Usage: python benchmarks/performance.py [PART OF A COMMAND]
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def made_again(block: re.Match[str]) -> str:
    """The block, by its command."""
    begin, command, end = block.groups()
    if not all(part in command for part in sys.argv[1:]):
        return block[0]
    print(command, flush=True)
    arguments = [sys.executable if word == "python" else word for word in command.split()]
    output = subprocess.run(arguments, cwd=PAGE.parent.parent, check=True, stdout=subprocess.PIPE, text=True).stdout
    return f"{begin}\n{output.strip()}\n\n{end}"


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(
        re.sub(r"(```sh\n(python benchmarks/[^\n]*)\n```\n).*?(<!-- end -->)", made_again, text, flags=re.DOTALL)
    )
