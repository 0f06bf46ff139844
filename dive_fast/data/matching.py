"""Which class a name or number means."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence

from dive_fast.core.distinct import without_row
from dive_fast.core.names import comparable
from dive_fast.errors import DataError, some


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


def label_rows(
    where: str, labels: Sequence[str | int], class_names: Sequence[str], what: str = "the label"
) -> list[int]:
    """The row of the class that each of the data's labels means.

    Args:
        where: what a sentence calls the data.
        labels: names, as ``ClassMatcher.meant`` takes them, or rows.
        class_names: of the model, in order.
        what: what a sentence calls a label.

    Raises:
        DataError: the model does not know one, or it could mean several classes.
    """
    matcher = ClassMatcher(class_names)
    found = [
        matcher.meant(label)
        if isinstance(label, str)
        else [label] * (0 <= label < len(class_names))
        for label in labels
    ]
    unknown = [label for label, rows in zip(labels, found, strict=True) if not rows]
    if unknown:
        raise DataError(
            f"{where}: the model does not know the classes {some(unknown)}: expected names such "
            f"as {some(class_names)} or indices 0 to {len(class_names) - 1}."
        )
    for label, rows in zip(labels, found, strict=True):
        if len(rows) > 1:
            raise DataError(
                f"{where}: {what} {label!r} could be any of the model's classes "
                f"{', '.join(map(str, rows))}: name it by its index."
            )
    return [rows[0] for rows in found]


def named_labels(labels: Sequence[str | int]) -> list[str] | None:
    """What the data call their classes, sorted; None where all labels are numbers."""
    names = sorted(map(str, labels))
    return None if all(name.isascii() and name.isdigit() for name in names) else names


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
