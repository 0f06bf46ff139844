"""Names of classes as people write them, for comparison."""

from __future__ import annotations

import re
import unicodedata

_BETWEEN_WORDS = re.compile(r"[\s_-]+")


def comparable(name: str) -> str:
    """``name`` without what differs between two spellings of the same words.

    Unicode in its composed form (NFC; macOS decomposes file names), no case, and one blank for
    every run of blanks, underscores and hyphens: "Traffic_Light" and "traffic-light" are alike.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return _BETWEEN_WORDS.sub(" ", folded).strip()
