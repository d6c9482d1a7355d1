"""Reports as a single HTML file."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from lsoftmax_lightning.cli import main
from lsoftmax_lightning.compare import report
from lsoftmax_lightning.errors import InputError
from lsoftmax_lightning.html_page import Section, figure_html, table_html, text_html, write_page

from .helpers.command_line import SHORT


class Page(HTMLParser):
    """Parsed page: headings, images and texts; fails for unclosed tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.images: dict[str, bytes] = {}
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert "href" not in values  # nothing is fetched
        if tag == "img":
            source = str(values["src"])
            assert source.startswith("data:image/png;base64,")
            self.images[str(values["alt"])] = base64.b64decode(source.partition(",")[2])
        elif tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_texts_are_escaped() -> None:
    sections = [
        Section("<Table>", table_html(["a & b"], [["<1>"]])),
        Section("Text", text_html("x < y\n  z")),
        Section("Figure", figure_html(Figure(figsize=(1, 1)), '"name"')),
    ]
    write_page(Path("page.html"), "It's", sections)
    page = Page(Path("page.html"))
    assert page.headings == ["It's", "<Table>", "Text", "Figure"]
    assert {"a & b", "<1>", "x < y\n  z"} <= set(page.texts)
    assert Image.open(io.BytesIO(page.images['"name"'])).size == (120, 120)


def test_a_run_and_a_comparison_have_a_page() -> None:
    drawn = [word for word in SHORT if "every_n_epochs" not in word]
    main(["fit", "--config=digits.yaml", *drawn, "--dashboard.html=true"])
    page = Page(Path("runs/digits/m2-s0/report.html"))
    assert page.headings[0] == "Run runs/digits/m2-s0"
    plots = {"Test: plots", "Validation: plots"}
    metrics = {"Test: Accuracy and loss", "Validation: Accuracy and loss"}
    assert plots | metrics | {"Settings", "Machine and versions"} <= set(page.headings)
    assert {"test/confusion", "val/confusion", "val/features"} <= page.images.keys()
    assert any(re.search(r"margin: 2\n", text) for text in page.texts)
    assert "torch" in page.texts

    main(["test", f"--config={Path('runs/digits/m2-s0/config.yaml')}", "--ckpt_path=best"])
    page = Page(Path("runs/digits/m2-s0/test/report.html"))
    assert "Test: plots" in page.headings
    assert "Validation: plots" not in page.headings


def test_a_page_of_a_comparison_needs_a_folder() -> None:
    rows = Path(__file__).parents[1] / "docs" / "results" / "mnist_1000.csv"
    with pytest.raises(InputError, match="html: needs a folder for the page"):
        report(rows, html=True)
    main(["compare", "--report", str(rows), "--folder", "page", "--html"])
    page = Page(Path("page/report.html"))
    assert page.headings == ["Comparison page", "Accuracy", "Plots", "How it was measured"]
    assert "accuracy" in page.images
    assert any("compare --config" in text for text in page.texts)
