"""The layouts of a data set as a model writes them; what does not fit is left out and counted."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from dive_fast.core.layouts import Layout, LayoutFormat
from dive_fast.data.coco import CocoDataset
from dive_fast.data.coco.classes import class_categories
from dive_fast.errors import DataError


class FittingLayouts(NamedTuple):
    """The layouts that a format can write, and whose they are.

    Attributes:
        images: int64 [N], positions in ``dataset.images``.
        tokens: int64 [N, S].
        left_out: one sentence on each kind of thing left out.
    """

    images: Tensor
    tokens: Tensor
    left_out: tuple[str, ...]


def layout_tokens(dataset: CocoDataset, layout: LayoutFormat) -> tuple[Tensor, tuple[str, ...]]:
    """``fitting_layouts`` for those who do not need the images: tokens and sentences."""
    found = fitting_layouts(dataset, layout)
    return found.tokens, found.left_out


def fitting_layouts(dataset: CocoDataset, layout: LayoutFormat) -> FittingLayouts:
    """The layouts of all images as tokens, and one sentence on each kind of thing left out.

    Left out are crowds, boxes of classes that the format lacks (names are compared without regard
    to case), boxes below a step of its grid, the smallest objects of images that have more than
    its slots, and images of which nothing is left. Images annotated as empty stay.

    Raises:
        DataError: no class in common, or not one layout is left.
    """
    known = class_categories(dataset, layout.names)
    class_of = {number: c for c, number in enumerate(known) if number is not None}
    renamed = torch.tensor([class_of.get(number, -1) for number in dataset.category_ids])
    left_out: Counter[str] = Counter()
    rows, numbers = [], []
    for number, image in enumerate(dataset.images):
        whole = image.layout()
        left_out["crowd"] += int(image.crowd.sum())
        ids = renamed[whole.class_ids]
        unknown = ids < 0
        left_out["unknown"] += int(unknown.sum())
        small = ~unknown & ~layout.encodable(whole.boxes)
        left_out["small"] += int(small.sum())
        kept = torch.nonzero(~unknown & ~small)[:, 0]
        if len(kept) > layout.max_objects:
            left_out["too many"] += len(kept) - layout.max_objects
            sides = whole.boxes[kept, 2:] - whole.boxes[kept, :2]
            largest = sides.prod(dim=1).argsort(descending=True, stable=True)
            kept = kept[largest[: layout.max_objects].sort().values]
        if len(kept) == 0 and len(image.boxes):
            left_out["image"] += 1
            continue
        numbers.append(number)
        rows.append(layout.encode(Layout(whole.boxes[kept], ids[kept])))
    if not rows:
        raise DataError(
            f"{dataset.source}: expected a layout that the model can write, got none of "
            f"{len(dataset.images)}."
        )
    sentences = _sentences(dataset.source, layout, left_out)
    return FittingLayouts(torch.tensor(numbers), torch.stack(rows), sentences)


def _sentences(source: str, layout: LayoutFormat, left_out: Counter[str]) -> tuple[str, ...]:
    said = {
        "crowd": "boxes left out because they mark crowds",
        "unknown": "boxes left out because the model lacks their classes",
        "small": f"boxes left out because they are below a step of the {layout.grid} x "
        f"{layout.grid} grid",
        "too many": f"boxes left out beyond the {layout.max_objects} largest of an image",
        "image": "images left out because no box of theirs is left",
    }
    return tuple(
        f"{source}: {sentence}: {left_out[kind]}."
        for kind, sentence in said.items()
        if left_out[kind]
    )
