"""The built documentation: complete, readable offline, and without a broken link."""

import re
import zlib
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name, walk_packages
from urllib.parse import unquote

import pytest
from filelock import FileLock
from sphinx.cmd.build import main as build

import lsoftmax_lightning

from .helpers.forked import run_on

DOCS = Path(__file__).parent.parent / "docs"

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """Anchors, links and resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.resources: set[str] = set()
        self.tags: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a":
            self.links |= {values["href"]} if "href" in values else set()
        else:
            self.resources |= {values[name] for name in ("src", "href", "srcset", "data", "poster") if name in values}


def sphinx(folder: Path) -> None:
    raise SystemExit(build(["-q", "-W", "--keep-going", str(DOCS), str(folder)]))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of the site, which the processes of pytest share; a warning fails the build."""
    output = tmp_path_factory.mktemp("output")
    shared = output.parent if worker_id == "master" else output.parent.parent
    folder = shared / "site"
    with FileLock(shared / "site.lock"), pytest.MonkeyPatch.context() as monkeypatch:
        if not folder.exists():
            monkeypatch.chdir(output)
            done = run_on(1, partial(sphinx, folder))
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_link_within_the_site_has_a_target(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.name}: {link}")
    assert not broken, broken


def test_no_page_loads_anything_from_a_network(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        remote = [name for name in page.resources if re.match(r"(https?:)?//", name)]
        assert not remote, path
        scripts = re.findall(r"<(?:script|style)\b[^>]*>(.*?)</(?:script|style)>", path.read_text(), flags=re.DOTALL)
        assert not re.findall(r"(?:url\(|import|fetch|src)\W{0,4}(?:https?:)?//", "".join(scripts)), path
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", path.read_text()), path
        for name in re.findall(r"url\(['\"]?([^'\")#?]+)", path.read_text()):
            assert name.startswith("data:") or (path.parent / name).is_file(), name


def test_formulas_are_mathml(pages: dict[Path, Page]) -> None:
    formulas = {path.name: page.tags["math"] for path, page in pages.items() if page.tags["math"]}
    assert {"loss.html", "lambda.html", "functional.html"} <= formulas.keys()


def documented(site: Path) -> list[tuple[str, str]]:
    """Full name and role of everything in the API reference, without aliases."""
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    entries = [line.split() for line in lines]
    return [(name, role) for name, role, priority, *_ in entries if role.startswith("py:") and priority != "-1"]


def test_every_public_name_is_documented_once(site: Path) -> None:
    roles = {"py:class", "py:data", "py:exception", "py:function"}
    names = Counter(id(resolve_name(name)) for name, role in documented(site) if role in roles)
    packages = [module.name for module in walk_packages(lsoftmax_lightning.__path__, "lsoftmax_lightning.")]
    for package in ["lsoftmax_lightning", *(name for name in packages if not name.endswith("__main__"))]:
        module = import_module(package)
        for name in getattr(module, "__all__", ()):
            assert names[id(getattr(module, name))] == 1, f"{package}.{name}"


def test_methods_that_only_lightning_calls_are_left_out(site: Path) -> None:
    last = {name.rpartition(".")[2] for name, _ in documented(site)}
    assert {"lambda_", "configure_losses", "forward"} <= last
    hooks = {"setup", "training_step", "state_dict", "load_state_dict", "train_dataloader"}
    assert not [name for name in last if name in hooks or name.startswith("on_")]
