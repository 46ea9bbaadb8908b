"""Draws the formulas of the documentation while it is built, so that a page needs no script and no network for them.

`pymdownx.arithmatex` finds `$...$` and `$$...$$`; matplotlib's mathtext sets them, and they become SVG paths in the
text's colour with their source as the label for screen readers. This module knows nothing of the library.
"""

from __future__ import annotations

import html
import re
from functools import cache

import matplotlib as mpl
import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath, text_to_path

# What arithmatex makes of formulas: \( \) within a line, \[ \] on lines of their own.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_UNITS = 100  # of the SVG, in an em
_SIZE = 1.08  # of a formula's letters, in an em of the text around it: STIX letters are small
_COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}


def on_page_content(content: str, **_: object) -> str:
    """Called by MkDocs with the HTML of each page."""
    return _FORMULA.sub(lambda found: _drawn(found[1], " ".join(html.unescape(found[2]).split())), content)


@cache
def _drawn(tag: str, source: str) -> str:
    """One formula as an SVG that stands on the text's line."""
    formula = f"${source}$"
    font = FontProperties(size=_UNITS, math_fontfamily="stix")
    with mpl.rc_context({"text.usetex": False}):
        width, height, depth = text_to_path.get_text_width_height_descent(formula, font, ismath=True)
        path = TextPath((0, 0), formula, size=_UNITS, prop=font)
    box = f"0 {depth - height:.0f} {width:.0f} {height:.0f}"
    style = "; ".join(
        f"{name}: {value * _SIZE / _UNITS:.3f}em"
        for name, value in (("width", width), ("height", height), ("vertical-align", -depth))
    )
    label = html.escape(source, quote=True)
    picture = (
        f'<svg class="formula" role="img" aria-label="{label}" viewBox="{box}" style="{style}">'
        f'<path d="{_outline(path)}"/></svg>'
    )
    return f'<div class="formula">{picture}</div>' if tag == "div" else picture


def _outline(path: Path) -> str:
    """A path in SVG's words, with y pointing down."""
    return "".join(
        _COMMANDS[code] + " ".join(f"{x:.1f} {-y:.1f}" for x, y in np.reshape(points, (-1, 2)))
        if code != Path.CLOSEPOLY
        else "Z"
        for points, code in path.iter_segments(simplify=False, curves=True)
    )
