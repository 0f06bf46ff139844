"""Layouts as tokens, changed in training: in another order, empty, or without classes."""

from __future__ import annotations

import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.projection import SLOTS_PER_OBJECT


def shuffle_objects(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """The objects of every layout in a random order, present or not; tokens int64 [B, S].

    Slots after the last whole triple (the crop's corners) stay where they are.
    """
    end = _objects_end(tokens)
    triples = tokens[:, :end].unflatten(1, (-1, SLOTS_PER_OBJECT))
    order = torch.rand(triples.shape[:2], generator=generator).argsort(dim=1)
    shuffled = triples.gather(1, order[:, :, None].expand_as(triples)).flatten(1)
    return torch.cat([shuffled, tokens[:, end:]], dim=1)


def empty(tokens: Tensor, none: int) -> Tensor:
    """Layouts of the same form without objects."""
    emptied = tokens.clone()
    emptied[:, : _objects_end(tokens)] = none
    return emptied


def without_names(tokens: Tensor, layout: LayoutFormat, chosen: Tensor) -> Tensor:
    """The layouts of the chosen rows, bool [B], with classes that are not known: tokens of -1."""
    start, stop = layout.class_range
    is_class = torch.zeros_like(tokens, dtype=torch.bool)
    slots = tokens[:, : _objects_end(tokens) : SLOTS_PER_OBJECT]
    present = (slots != layout.none) & (slots >= start) & (slots < stop)
    is_class[:, : _objects_end(tokens) : SLOTS_PER_OBJECT] = present
    return tokens.masked_fill(is_class & chosen[:, None], -1)


def _objects_end(tokens: Tensor) -> int:
    """Where the slots of the objects end; those of a crop follow."""
    return tokens.shape[1] // SLOTS_PER_OBJECT * SLOTS_PER_OBJECT
