"""Configuration of Sphinx; ``make docs`` builds the pages."""

from importlib.metadata import version as installed

project = "lsoftmax_lightning"
author = "The lsoftmax_lightning authors"
copyright = "2026, the lsoftmax_lightning authors"
version = release = installed("lsoftmax-lightning")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lsoftmax_lightning"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
