"""HTML pages in a single file, with embedded images."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from .atomic import write_text

_DPI = 120
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap; }
td + td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: white; margin: .5rem 0; }
pre { overflow-x: auto; background: #8881; padding: .8rem; font-size: .85rem; }
"""


class Section(NamedTuple):
    """Section of a page."""

    title: str
    """Heading."""
    content: str
    """Content as HTML."""


def figure_html(figure: Figure, name: str) -> str:
    """Return a figure as an embedded PNG image, with ``name`` as its alternative text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def table_html(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as HTML; an empty ``header`` is omitted."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr>"] if header else []
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def text_html(text: str) -> str:
    """Return preformatted text as HTML."""
    return f"<pre>{html.escape(text)}</pre>"


def write_page(path: Path, title: str, sections: Iterable[Section]) -> None:
    """Write a page to a file atomically.

    Args:
        path: Path of the file.
        title: Title and first heading.
        sections: Sections of the page.
    """
    parts = "".join(f"<h2>{html.escape(section.title)}</h2>{section.content}" for section in sections)
    name = html.escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    write_text(
        path,
        f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body><h1>{name}</h1>{parts}</body>'
        "</html>\n",
    )
