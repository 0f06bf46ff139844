"""Equal names of classes made distinct: ImageNet has "missile" and "sunglasses" twice."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Every name that occurs more than once gets its row in brackets: "missile (657)".

    Names that differ only in the composition of their letters (NFC, NFD) are equal. Where a made
    name is there already, the row stands behind it once more.
    """
    plain = [unicodedata.normalize("NFC", name) for name in names]
    counts = Counter(plain)
    taken = {name for name, n in counts.items() if n == 1}
    made = []
    for row, (name, key) in enumerate(zip(names, plain, strict=True)):
        if counts[key] > 1:
            name = f"{name} ({row})"
            while unicodedata.normalize("NFC", name) in taken:
                name = f"{name} ({row})"
            taken.add(unicodedata.normalize("NFC", name))
        made.append(name)
    return tuple(made)


def without_row(name: str, row: int) -> str:
    """The name before ``distinct_names``, composed: "missile" of "missile (657)" in row 657."""
    end = f" ({row})"
    while name.endswith(end):
        name = name.removesuffix(end)
    return unicodedata.normalize("NFC", name)


def renamed(before: Sequence[str], after: Sequence[str], at_most: int = 4) -> str | None:
    """What ``distinct_names`` did, for a sentence: "'missile (657)', 'missile (744)'"; or None."""
    changed = [repr(new) for old, new in zip(before, after, strict=True) if old != new]
    if not changed:
        return None
    more = len(changed) - at_most
    return ", ".join(changed[:at_most]) + (f" and {more} more" if more > 0 else "")
