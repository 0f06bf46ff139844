"""The page: parts through the template, one file with everything in it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from dive_fast import __version__
from dive_fast.report.parts import Section

_FILES = resources.files("dive_fast.report") / "templates"
# Letters that no HTML may hold, and halves of letters that no file can.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(title: str, subtitle: str, notes: Sequence[str], sections: Sequence[Section]) -> bytes:
    """The HTML file.

    Args:
        title, subtitle: at the top.
        notes: sentences that stand above everything, on what is not shown.
        sections: in their order.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("dive_fast.report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_FILES / "style.css").read_text(), (_FILES / "sort.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        notes=notes,
        sections=sections,
        style=style,
        script=script,
        script_digest=digest,
        version=__version__,
    )
    return page.encode()


def _printable(value: Any) -> Any:
    """Names may hold any letters: what a page cannot is written as an escape."""
    if isinstance(value, str) and _UNPRINTABLE.search(value):
        escaped = _UNPRINTABLE.sub(lambda m: f"\\u{ord(m.group()):04x}", value)
        return type(value)(escaped)  # what is markup already stays so
    return value
