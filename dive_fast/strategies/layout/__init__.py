"""Searches for the layout that explains an image: generators, like all strategies.

``register_layout_strategy`` takes others from outside.
"""

from __future__ import annotations

from dive_fast.strategies.layout.board import (
    ANY,
    Board,
    Item,
    Items,
    LayoutAnswer,
    LayoutStrategy,
)
from dive_fast.strategies.layout.boxes import Box
from dive_fast.strategies.layout.guided import Guided
from dive_fast.strategies.layout.invert import InvertLayout
from dive_fast.strategies.layout.registry import (
    layout_strategy_names,
    register_layout_strategy,
    resolve_layout_strategy,
)

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
    "layout_strategy_names",
    "register_layout_strategy",
    "resolve_layout_strategy",
]

register_layout_strategy("guided", Guided())
register_layout_strategy("invert", InvertLayout())
