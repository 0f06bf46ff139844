"""Columns of the data by whose values a run's figures are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from dive_fast.core.numbers import is_number
from dive_fast.data import DataSet, Example
from dive_fast.errors import DataError, shown, some

MOST_VALUES = 1000  # of a column: one of more is a name of each image rather than of a group
_AHEAD = 100  # images of a stream that are looked at: to see all is to read it twice


def expect_columns(data: DataSet, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns, each once, if the images have them.

    An image may lack a value. Of a stream only the first images are looked at.

    Raises:
        DataError: no image has a column, a value is no text or number, or there are very many.
    """
    if isinstance(columns, str) or not all(isinstance(column, str) for column in columns):
        raise DataError(f"expected the names of columns to group by, got {shown(columns)}.")
    wanted = tuple(dict.fromkeys(columns))
    if not wanted:
        return ()
    values: dict[str, set[str]] = {column: set() for column in wanted}
    there: dict[str, None] = {}
    for example in islice(data.examples, _AHEAD if data.labels is None else None):
        there.update(dict.fromkeys(example.facts))
        for column, value in _values(example, wanted).items():
            values[column].add(str(value))
            if len(values[column]) > MOST_VALUES:
                raise DataError(
                    f"expected a column of at most {MOST_VALUES} values to group by, got "
                    f"{column!r} with more."
                )
    if missing := [column for column in wanted if not values[column]]:
        found = f"the columns {some(list(there))}" if there else "none"
        raise DataError(f"expected a column of the data to group by ({found}), got {missing[0]!r}.")
    return wanted


def facts_of(example: Example, columns: Sequence[str]) -> dict[str, Any]:
    """What a record says of an image beside its answer."""
    facts: dict[str, Any] = {"truth": example.label}
    if columns:
        facts["groups"] = _values(example, columns)
    return facts


def _values(example: Example, columns: Sequence[str]) -> dict[str, str | int | float | bool]:
    """The image's values in the columns, without those that it lacks."""
    found = {column: example.facts[column] for column in columns if column in example.facts}
    for column, value in found.items():
        if not (isinstance(value, str | bool) or is_number(value)):
            raise DataError(
                f"expected a text or a number in the column {column!r} of {example.id!r}, got "
                f"{shown(value)}."
            )
    return found
