"""The errors that users see: one sentence each, saying what was expected and what was got."""

from __future__ import annotations


class DiveFastError(ValueError):
    """Something the caller gave cannot be used.

    The message is one sentence for a person; the command line prints it and exits with code 2.
    """


class ImageError(DiveFastError):
    """A picture that cannot be read, or an array that is no picture."""


class ModelError(DiveFastError):
    """A model directory, hub id or checkpoint that cannot be used."""


class DataError(DiveFastError):
    """A data set that cannot be read, or whose labels the model does not know."""


class RunError(DiveFastError):
    """A run directory that cannot be written, or that holds another run."""
