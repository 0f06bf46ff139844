"""Which class a folder's name means."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence

from dive_fast.core.distinct import without_row
from dive_fast.core.names import comparable


class ClassMatcher:
    """Finds the rows of the classes that a name can mean.

    The closest way of reading decides: the whole name to the letter; the name that several classes
    share ("missile" of "missile (657)"); without regard to case; with underscores, hyphens and
    blanks alike; then in these two ways one of the synonyms between commas. Letters with accents
    are compared in their composed form.

    Args:
        class_names: of the model, in order.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        rows = list(enumerate(class_names))
        self.n_classes = len(rows)
        shared = [(row, without_row(name, row)) for row, name in rows]
        whole = list(dict.fromkeys(rows + shared))
        synonyms = [(row, part) for row, name in whole for part in name.split(",")]
        self._ways = [
            (_composed, _table(rows, _composed)),
            (_composed, _table(shared, _composed)),
            (_folded, _table(whole, _folded)),
            (comparable, _table(whole, comparable)),
            (_folded, _table(synonyms, _folded)),
            (comparable, _table(synonyms, comparable)),
        ]

    def named(self, name: str) -> list[int]:
        """The rows of the classes that are called so."""
        for read, table in self._ways:
            if found := table.get(read(name)):
                return found
        return []

    def meant(self, name: str) -> list[int]:
        """As ``named``; an integer that no class is called is the class of that index."""
        found = self.named(name)
        if not found and name.isascii() and name.isdigit() and int(name) < self.n_classes:
            return [int(name)]
        return found


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(_composed(name).casefold()).strip()


def _table(named: Iterable[tuple[int, str]], read: Callable[[str], str]) -> dict[str, list[int]]:
    """What a name reads as, to the rows of the classes; what reads as nothing is left out."""
    table: dict[str, list[int]] = {}
    for row, name in named:
        if (key := read(name)) and row not in table.setdefault(key, []):
            table[key].append(row)
    return table
