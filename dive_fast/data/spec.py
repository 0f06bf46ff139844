"""What ``--data`` says: a place, and options behind a question mark (``t.csv?image=file``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import parse_qsl

from dive_fast.core.names import comparable
from dive_fast.errors import DataError, some

IMAGE_COLUMNS = (
    "image", "img", "path", "image path", "img path", "file", "filename", "file name", "filepath",
    "file path", "image file", "images",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "class", "truth", "target", "category", "class name", "label name", "classname",
    "ground truth", "fine label", "labels", "cls", "y",
)  # fmt: skip


def split_options(spec: str, allowed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The place and its options, as a web address has them: ``?NAME=VALUE&NAME=VALUE``.

    A file whose name has a question mark in it is taken as it stands, and a question mark without
    an equals sign behind it is part of the place.

    Raises:
        DataError: an unknown option, one without a value, or one given twice.
    """
    place, _, query = spec.rpartition("?")
    if "=" not in query or os.path.exists(spec) or not place:
        return spec, {}
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs):
        raise DataError(f"{spec}: expected each option once, got {'?' + query!r}.")
    for name, value in pairs:
        if name not in allowed:
            raise DataError(f"{spec}: expected the options {', '.join(allowed)}, got {name!r}.")
        if not value:
            raise DataError(f"{spec}: expected a value of {name}, got none.")
    return place, options


def find_column(where: str, columns: Sequence[str], usual: Sequence[str], named: str | None) -> str:
    """The column of this name, or else the first of the usual names that there is.

    Usual names count in any case, with blanks, underscores or hyphens between their words.

    Args:
        where: what a sentence calls the table.
        columns: that there are.
        usual: the names, the likeliest first; ``IMAGE_COLUMNS`` or ``LABEL_COLUMNS``.
        named: what the user called it.

    Raises:
        DataError: there is no such column.
    """
    if named is not None:
        if named in columns:
            return named
        raise DataError(f"{where}: expected a column {named!r}, got {_listed(columns)}.")
    spelt: dict[str, str] = {}
    for column in columns:
        spelt.setdefault(comparable(column), column)
    for name in usual:
        if name in spelt:
            return spelt[name]
    option = "image" if usual is IMAGE_COLUMNS else "label"
    raise DataError(
        f"{where}: expected a column called {usual[0]}, {usual[2]} or so (another is named by "
        f"'?{option}=COLUMN'), got {_listed(columns)}."
    )


def _listed(columns: Sequence[str]) -> str:
    return f"the columns {some(columns, 12)}" if columns else "no columns"
