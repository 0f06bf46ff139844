"""matplotlib's figures as SVG that stands inside a page: its colours, fonts and ids are the page's.

Colours are drawn as stand-ins, ``#000001`` and so on, and become the page's variables, so that one
drawing suits a light and a dark page.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

SERIES = 8  # colours; a run more than these has the first again, and another marker
INK, MUTED, GRID, SURFACE = "#0000f0", "#0000f1", "#0000f2", "#0000f3"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", SURFACE: "surface"}

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_SETTINGS = {
    "svg.fonttype": "none",  # texts stay texts
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def colour(series: int) -> str:
    """The stand-in for the colour of a run."""
    return f"#0000{series % SERIES + 1:02x}"


def drawn(name: str, draw: Callable[[object], None], size: tuple[float, float]) -> str:
    """An inline ``<svg>`` without ids that another one has.

    Args:
        name: of the figure, each once in a page.
        draw: draws into an empty matplotlib ``Figure``.
        size: (width, height) in inches; the page scales it.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return inline(file.getvalue(), name)


def inline(source: bytes, name: str) -> str:
    """An SVG file as an element of a page, its ids with ``name`` before them."""
    root = ET.fromstring(source)
    used = {e.get(_HREF, "")[1:] for e in root.iter()}
    used |= set(re.findall(r"url\(#([^)]+)\)", source.decode()))
    for parent in list(root.iter()):
        for child in list(parent):
            # A style sheet inside would be the whole page's.
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _adapt(element, used, name)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("aria-hidden", "true")  # the figure around it says what it shows
    root.set("focusable", "false")
    return re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode"))


def _adapt(element: ET.Element, used: set[str], name: str) -> None:
    if (own := element.attrib.pop("id", None)) in used:
        element.set("id", f"{name}-{own}")
    if (target := element.attrib.pop(_HREF, None)) is not None:
        element.set("href", f"#{name}-{target[1:]}")
    for key, value in element.attrib.items():
        value = value.replace("url(#", f"url(#{name}-")
        if key == "style":
            value = re.sub(r"font-family: [^;]*;? ?", "", value)
            value = re.sub(r"#0000[0-9a-f]{2}", _variable, value)
        elif key == "d":
            value = " ".join(value.split())
        element.set(key, value)


def _variable(match: re.Match[str]) -> str:
    found = match.group()
    if found in _VARIABLES:
        return f"var(--{_VARIABLES[found]})"
    return f"var(--s{int(found[1:], 16) - 1})" if found != "#000000" else "var(--ink)"
