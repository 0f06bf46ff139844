"""Searches for the layout that explains an image: generators, like all strategies."""

from __future__ import annotations

from typing import Any

from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import with_settings
from dive_fast.strategies.layout.board import (
    ANY,
    Board,
    Box,
    Item,
    Items,
    LayoutAnswer,
    LayoutStrategy,
)
from dive_fast.strategies.layout.guided import Guided
from dive_fast.strategies.layout.invert import InvertLayout

__all__ = [
    "ANY",
    "Board",
    "Box",
    "Guided",
    "InvertLayout",
    "Item",
    "Items",
    "LayoutAnswer",
    "LayoutStrategy",
    "resolve_layout_strategy",
]

STRATEGIES: dict[str, LayoutStrategy] = {"guided": Guided(), "invert": InvertLayout()}


def resolve_layout_strategy(
    strategy: str | LayoutStrategy | None, settings: dict[str, Any]
) -> LayoutStrategy:
    """The search that a user asked for by name or as an object, with settings.

    Raises:
        DiveFastError: an unknown name or setting.
    """
    name = "guided" if strategy is None else strategy
    if isinstance(name, str):
        if name not in STRATEGIES:
            raise DiveFastError(
                f"expected a strategy for layouts of {', '.join(STRATEGIES)}, got {name!r}."
            )
        name = STRATEGIES[name]
    return with_settings(name, settings)
