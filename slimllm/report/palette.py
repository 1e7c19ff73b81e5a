"""Colours of the pictures; in the page they are CSS variables, so that they follow its light or dark style."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    """Colours of text and axes, grid lines, first and second series, and removed parts."""

    ink: str
    grid: str
    first: str
    second: str
    gone: str


LIGHT = Palette(ink="#1f2328", grid="#d5d9de", first="#1f5fa8", second="#c8641b", gone="#868f99")
DARK = Palette(ink="#e6e9ed", grid="#3a4048", first="#6fa8e8", second="#f0a35e", gone="#76808c")
# Placeholders for the variables while matplotlib draws; nothing else has these colours.
_NAMES = {"ink": "#000001", "grid": "#000002", "first": "#000003", "second": "#000004", "gone": "#000005"}
VARIABLE = Palette(**_NAMES)
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "slimllm",
    "font.family": "sans-serif",
}


def css(palette: Palette) -> str:
    """Return the CSS variables with the colours of a palette."""
    return " ".join(f"--{name}: {getattr(palette, name)};" for name in _NAMES)


def svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure drawn with `VARIABLE` as SVG for a page with others: with unique identifiers and a description."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    for variable, color in _NAMES.items():
        text = text.replace(color, f"var(--{variable})")
    start = text.index("<svg ")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[start:])
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)
