"""Equal names of classes made distinct: ImageNet has "missile" and "sunglasses" twice."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence

from dive_fast.errors import DiveFastError

log = logging.getLogger(__name__)


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Every name that occurs more than once gets its row in brackets: "missile (657)".

    Names that differ only in the composition of their letters (NFC, NFD) are equal. Where somebody
    is called by the made name already, the row stands behind it once more.
    """
    plain = [unicodedata.normalize("NFC", name) for name in names]
    counts = Counter(plain)
    taken = set(counts)
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


def told_apart(names: Sequence[str], where: str = "", prompts: bool = False) -> tuple[str, ...]:
    """``distinct_names``, with a warning where that changes something.

    Args:
        where: what the warning begins with.
        prompts: the classes have prompts, which may be the same.

    Raises:
        DiveFastError: a name is empty or no text.
    """
    start = f"{where}: " if where else ""
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise DiveFastError(
                f"{start}expected the name of class {row} as a text that is not empty, got "
                f"{name!r}."
            )
    made = distinct_names(names)
    changed = [repr(new) for old, new in zip(names, made, strict=True) if old != new]
    if changed:
        listed = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" * (len(changed) > 4))
        ties = "; where their prompts are the same as well, ties go to the lowest row"
        log.warning(
            "%sclasses of the same name are told apart by their rows: %s%s.",
            start, listed, ties if prompts else "",
        )  # fmt: skip
    return made
