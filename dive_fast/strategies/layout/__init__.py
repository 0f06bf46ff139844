"""Searches for the layout that explains an image: generators, like all strategies."""

from dive_fast.strategies.layout.board import ANY, Board, Box, Item, Items, LayoutAnswer
from dive_fast.strategies.layout.guided import Guided
from dive_fast.strategies.layout.invert import InvertLayout

__all__ = ["ANY", "Board", "Box", "Guided", "InvertLayout", "Item", "Items", "LayoutAnswer"]
