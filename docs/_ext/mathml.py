"""Renders formulas as MathML at build time, so that a page needs neither JavaScript nor a network.

The font of the formulas, ``_static/math.woff2``, is a subset of STIX Two Math 5.3.0 from the npm package
``@fontsource/stix-two-math``, made with fonttools::

    pyftsubset stix-two-math-latin-400-normal.woff2 --flavor=woff2 --no-hinting --layout-features='*' \
        --output-file=math.woff2 --unicodes=U+0020-007E,U+00A0-00B7,U+00D7,U+00F7,U+0131,U+0237,U+02C6-02DD,\
U+0300-030C,U+0391-03F6,U+2010-2044,U+2057,U+20D6-20D7,U+2102-2124,U+2190-21D5,U+2200-22FF,U+2308-230B,\
U+23B4-23B5,U+23DC-23DF,U+27E8-27EB,U+2A00-2A06,U+2AAF-2AB0,U+1D400-1D467,U+1D49C-1D4CF,U+1D538-1D56B,\
U+1D6A4-1D71B,U+1D7CE-1D7D7
"""

import re
from html import unescape
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

_LOGGER = logging.getLogger(__name__)
_BEFORE = (  # what latex2mathml does not read
    (r"\{aligned\}", "{split}"),
    (r"\\mathrm\{(\w)\}", r"\\text{\1}"),
    (r"\\arg\b", r"\\operatorname{arg}"),
)
_OPENING = r'(<mo stretchy="false">[(\[]</mo>|<mo>[=,]</mo>)'
_FUNCTION = (
    r"(?<!<msub>)(?<!<msup>)(?<!<munder>)(?<!<msubsup>)(?<!<munderover>)"
    r"<mi>(?:arccos|arg|cos|exp|log|max|min|sin|tan)</mi>"
)
_AFTER = (  # spaces and sizes as LaTeX has them
    (r"<mo>‖</mo>", '<mo stretchy="false">‖</mo>'),
    (_OPENING + r"<mo>\N{MINUS SIGN}</mo>", r'\1<mo form="prefix">&minus;</mo>'),
    (r"<mo>([a-z]+)</mo>", r"<mi>\1</mi>"),
    (rf"({_FUNCTION})(?=<mi>|<msub>|<mfrac>|<mn>)", r'\1<mspace width="0.167em" />'),
)


def mathml(latex: str, display: str, node: nodes.Node) -> str:
    """Return a formula as MathML.

    Args:
        latex: The formula.
        display: ``inline`` or ``block``.
        node: Its node, to locate a warning.
    """
    for pattern, replacement in _BEFORE:
        latex = re.sub(pattern, replacement, latex)
    text = convert(latex, display=display)
    text = re.sub(r"&#x([0-9A-F]+);", lambda match: _character(match[0]), text)
    for pattern, replacement in _AFTER:
        text = re.sub(pattern, replacement, text)
    if unknown := re.findall(r">(\\\w*|&amp;|&)<", text):
        _LOGGER.warning("a formula contains %s, which latex2mathml does not read: %s", unknown[0], latex, location=node)
    return text


def _character(reference: str) -> str:
    """Return the character of a numeric reference, except for those that HTML reserves."""
    character = unescape(reference)
    return reference if character in "<>&\"'" else character


def visit_inline(self: Any, node: nodes.math) -> None:
    """Write a formula in a line of text."""
    self.body.append(mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.math_block) -> None:
    """Write displayed formulas; an empty line separates them."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body += [mathml(part, "block", node) for part in re.split(r"\n\s*\n", node.astext().strip())]
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer as ``html_math_renderer = "mathml"``."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
