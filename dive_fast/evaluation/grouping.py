"""Columns of the data by whose values a run's figures are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dive_fast.core.numbers import is_number
from dive_fast.data import DataSet, Example
from dive_fast.errors import DataError, shown, some

MOST_VALUES = 1000  # of a column: one of more is a name of each image rather than of a group


def expect_columns(data: DataSet, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns, each once, if every image has a value in each.

    Raises:
        DataError: an image lacks one, its value is not one, or the values are very many.
    """
    if isinstance(columns, str) or not all(isinstance(column, str) for column in columns):
        raise DataError(f"expected the names of columns to group by, got {shown(columns)}.")
    wanted = tuple(dict.fromkeys(columns))
    values: dict[str, set[str]] = {column: set() for column in wanted}
    for example in data.examples if wanted else ():
        for column in wanted:
            values[column].add(str(_value(example, column)))
            if len(values[column]) > MOST_VALUES:
                raise DataError(
                    f"expected a column of at most {MOST_VALUES} values to group by, got "
                    f"{column!r} with more."
                )
    return wanted


def facts_of(example: Example, columns: Sequence[str]) -> dict[str, Any]:
    """What a record says of an image beside its answer."""
    facts: dict[str, Any] = {"truth": example.label}
    if columns:
        facts["groups"] = {column: _value(example, column) for column in columns}
    return facts


def _value(example: Example, column: str) -> str | int | float | bool:
    facts: Mapping[str, Any] = example.facts
    if column not in facts:
        there = f"the columns there are: {some(list(facts))}" if facts else "no column there is"
        raise DataError(
            f"expected every image to have the column {column!r} to group by, got "
            f"{example.id!r} without; {there}."
        )
    value = facts[column]
    if not (isinstance(value, str | bool) or is_number(value)):
        raise DataError(
            f"expected a text or a number in the column {column!r} of {example.id!r}, got "
            f"{shown(value)}."
        )
    return value
