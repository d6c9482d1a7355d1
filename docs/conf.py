"""Configuration of Sphinx; ``make docs`` builds the pages."""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, get_type_hints

from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "lsoftmax_lightning"
author = "The lsoftmax_lightning authors"
copyright = "2026, the lsoftmax_lightning authors"
version = release = installed("lsoftmax-lightning")
extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "lsoftmax_lightning"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it would fetch the pages, which a browser refuses for files

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks contain their outputs; a test executes them
nb_ipywidgets_js: dict[str, Any] = {}  # from a remote server by default
copybutton_exclude = ".linenos, .gp, .go"

autodoc_inherit_docstrings = False  # leaves out an override without a docstring of its own
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
strip_signature_backslash = True  # napoleon escapes `lambda_`, which would become a link

_HOOKS = {
    *(name for base in (Callback, CheckpointHooks, DataHooks, ModelCheckpoint, ModelHooks) for name in vars(base)),
    *("configure_callbacks", "training_step", "validation_step", "test_step", "predict_step"),
}


def skip_member(app: Sphinx, kind: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the methods that only Lightning calls, and fields of a NamedTuple that have no docstring."""
    return True if name in _HOOKS or str(member.__doc__).startswith("Alias for field number") else None


def keep_colon(app: Sphinx, kind: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Stop napoleon from reading the first words of an attribute's docstring, up to a colon, as its type."""
    if kind in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"


def use_types_of_init(app: Sphinx, kind: str, name: str, member: Any, *rest: Any) -> None:
    """Use the type of an argument, where autodoc would use that of the attribute of the same name."""
    if kind != "class" or not member.__module__.startswith(project):
        return
    recorded = app.env.temp_data.get("annotations", {}).get(name, {})
    attributes = {key for base in member.__mro__ for key in vars(base).get("__annotations__", {})}
    for key, kind in get_type_hints(member.__init__).items():
        if key in recorded and key in attributes:
            recorded[key] = stringify_annotation(kind, "smart")


def mend_back_links(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Correct the links from source code to the reference: viewcode assumes one module name for all of a file."""

    def anchor(match: re.Match[str]) -> str:
        names, parts = app.env.domains["py"].objects, match[1].split(".")
        suffixes = ["." + ".".join(parts[start:]) for start in range(1, len(parts))]
        found = (name for suffix in suffixes for name in names if name.endswith(suffix) and not names[name].aliased)
        return f"#{match[1] if match[1] in names else next(found, match[1])}"

    if page.startswith("_modules/"):
        context["body"] = re.sub(r"#(lsoftmax_lightning[\w.]+)", anchor, context["body"])


def setup(app: Sphinx) -> None:
    """Register the handlers."""
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", keep_colon, priority=400)  # napoleon has 500
    app.connect("html-page-context", mend_back_links)
    app.connect("autodoc-process-signature", use_types_of_init, priority=600)
