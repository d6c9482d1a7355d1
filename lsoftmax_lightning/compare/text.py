"""Formatting of command-line arguments, file names and Markdown tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


def format_argument(value: Any) -> str:
    """Format the value of a setting as a command-line argument."""
    return value if isinstance(value, str) else json.dumps(value)


def file_name(text: str) -> str:
    """Replace the characters that a file name should not contain."""
    return re.sub(r"[^\w.,+=-]", "_", text)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown, one row of cells per line."""
    lines = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
