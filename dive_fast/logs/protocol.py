"""What a logger is: two methods, so that one of the user's own is a short class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """Where figures go while they are computed."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes figures by their names.

        Args:
            step: how many images have a record, or how many steps were trained; never less than
                before.
        """
        ...

    def finish(self, summary: Mapping[str, float] | None) -> None:
        """Takes the final figures, and brings all that was logged to its place.

        Args:
            summary: None where the run was cut off, and may go on later.
        """
        ...


# "tensorboard", "wandb:PROJECT" and the like, or a logger that is open already.
LogTo = str | Logger
