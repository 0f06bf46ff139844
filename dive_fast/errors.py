"""The errors that users see: one sentence each, saying what was expected and what was got."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


class DiveFastError(ValueError):
    """Something the caller gave cannot be used.

    The message is one sentence for a person; the command line prints it and exits with code 2.
    """


class ImageError(DiveFastError):
    """An image that cannot be read, or an array that is none."""


class ModelError(DiveFastError):
    """A model directory, hub id or checkpoint that cannot be used."""


class DataError(DiveFastError):
    """A data set that cannot be read, or whose labels the model does not know."""


class RunError(DiveFastError):
    """A run directory that cannot be written, or that holds another run."""


def some(names: Sequence[str], at_most: int = 5) -> str:
    """The first few names, quoted, and how many more there are: for a sentence."""
    listed = ", ".join(repr(name) for name in names[:at_most])
    more = len(names) - at_most
    return f"{listed} and {more} more" if more > 0 else listed


def shown(value: object) -> str:
    """What was got, for a sentence: on one line, however large or deep it is."""
    try:
        return " ".join(_short.repr(value).split())
    except ValueError:  # an int of more digits than Python writes
        return type(value).__name__
