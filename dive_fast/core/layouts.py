"""Layouts (boxes with classes) and the token sequences that layout-to-image models read.

A layout is a sequence of slots: one triple (class, top-left corner, bottom-right corner) for every
object, then (none, none, none) up to the largest number of objects, then, in models that were
trained on crops, the two corners of the crop. A corner is one token on a G x G grid:

    token = coordinate_start + round(y (G - 1)) G + round(x (G - 1)),     x, y in [0, 1]

Source: latent diffusion (arXiv 2112.10752), layout-to-image models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dive_fast.core.config import LARGEST
from dive_fast.core.projection import SLOTS_PER_OBJECT, DiscreteProjection
from dive_fast.errors import DiveFastError, shown

Steps = TypeVar("Steps", int, Tensor)


@dataclass(frozen=True, eq=False)
class Layout:
    """The objects of one image, in order.

    Attributes:
        boxes: float32 [n, 4], (left, top, right, bottom) in the unit interval, the right and the
            bottom side above the left and the top one.
        class_ids: int64 [n], at least 0.

    Raises:
        DiveFastError: another shape or dtype, or a box that is empty, inverted or not inside.
    """

    boxes: Tensor
    class_ids: Tensor

    def __post_init__(self) -> None:
        boxes, ids = self.boxes, self.class_ids
        if boxes.dtype != torch.float32 or boxes.dim() != 2 or boxes.shape[1] != 4:
            _fail("boxes must be float32 of shape [n, 4]", f"{boxes.dtype} {list(boxes.shape)}")
        if ids.dtype != torch.int64 or ids.shape != boxes.shape[:1]:
            _fail(f"class_ids must be int64 of shape [{len(boxes)}]", f"{ids.dtype} {[*ids.shape]}")
        inside = ((boxes >= 0) & (boxes <= 1)).all(dim=1)  # false for NaN
        if not inside.all():
            _fail("boxes must lie in the unit interval", boxes[~inside][0].tolist())
        proper = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        if not proper.all():
            _fail(
                "boxes must be (left, top, right, bottom) of some size", boxes[~proper][0].tolist()
            )
        if (ids < 0).any():
            _fail("class_ids must be at least 0", int(ids.min()))

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class LayoutFormat:
    """How a model writes layouts as tokens.

    Attributes:
        names: of the classes; class c is token `class_start` + c.
        max_objects: the number of triples.
        grid: G; corners are `coordinate_start` + 0 ... G G - 1.
        vocabulary_size: the number of tokens.
        none: the token of all three slots of an absent object.
        class_start: where the classes' tokens start.
        coordinate_start: where the corners' tokens start. The two may share tokens, as they do in
            the published models: the slot tells which one is meant.
        crop: two more slots at the end hold the corners of the crop.

    Raises:
        DiveFastError: the tokens do not fit in the vocabulary, or "none" is one of them.
    """

    names: tuple[str, ...]
    max_objects: int
    grid: int
    vocabulary_size: int
    none: int
    class_start: int = 0
    coordinate_start: int = 0
    crop: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names:
            _fail("names must hold at least one class", "none")
        for name in self.names:
            if not isinstance(name, str) or not name.strip():
                _fail("names must be strings that are not empty", repr(name))
        if self.max_objects < 1:
            _fail("max_objects must be at least 1", self.max_objects)
        if self.grid < 2:
            _fail("grid must be at least 2", self.grid)
        for what in ("class", "coordinate"):
            start, stop = getattr(self, f"{what}_range")
            if start < 0 or stop > self.vocabulary_size:
                _fail(
                    f"the {what} tokens must be within [0, {self.vocabulary_size})",
                    f"[{start}, {stop})",
                )
            if start <= self.none < stop:
                _fail(f"none must be outside the {what} tokens [{start}, {stop})", self.none)
        if not 0 <= self.none < self.vocabulary_size:
            _fail(f"none must be in [0, {self.vocabulary_size})", self.none)

    @classmethod
    def compact(
        cls, names: Sequence[str], max_objects: int, grid: int, crop: bool = False
    ) -> LayoutFormat:
        """A token of its own for everything: classes, then corners, then none."""
        none = len(names) + grid * grid
        return cls(tuple(names), max_objects, grid, none + 1, none, 0, len(names), crop)

    @classmethod
    def latent_diffusion(
        cls,
        names: Sequence[str],
        max_objects: int = 30,
        vocabulary_size: int = 8192,
        crop: bool = True,
    ) -> LayoutFormat:
        """The published models': classes and corners share tokens, none is the last one.

        The grid is the largest square that fits in the vocabulary: 90 x 90 of 8192.
        """
        grid, none = math.isqrt(vocabulary_size), vocabulary_size - 1
        return cls(tuple(names), max_objects, grid, vocabulary_size, none, crop=crop)

    @property
    def n_slots(self) -> int:
        """S, the length of the token sequence."""
        return SLOTS_PER_OBJECT * self.max_objects + self.crop_slots

    @property
    def crop_slots(self) -> int:
        """How many slots at the end hold corners of the crop: 2 or 0."""
        return 2 if self.crop else 0

    @property
    def class_range(self) -> tuple[int, int]:
        """The classes' tokens, (start, stop)."""
        return self.class_start, self.class_start + len(self.names)

    @property
    def coordinate_range(self) -> tuple[int, int]:
        """The corners' tokens, (start, stop)."""
        return self.coordinate_start, self.coordinate_start + self.grid**2

    def encodable(self, boxes: Tensor) -> Tensor:
        """Which boxes [n, 4] have corners that differ on the grid, in x and in y: bool [n]."""
        steps = self._steps(boxes)
        return (steps[:, 2:] > steps[:, :2]).all(dim=1)

    def encode(self, layout: Layout) -> Tensor:
        """The tokens of a layout, int64 [S]; the order of its objects is kept.

        Raises:
            DiveFastError: more objects than slots, a class without a token, or a box so small that
                its corners fall on one line of the grid (see ``encodable``).
        """
        if len(layout) > self.max_objects:
            _fail(f"a layout may have {self.max_objects} objects", len(layout))
        if len(layout) and int(layout.class_ids.max()) >= len(self.names):
            _fail(f"class_ids must be below {len(self.names)}", int(layout.class_ids.max()))
        small = ~self.encodable(layout.boxes)
        if small.any():
            _fail(
                f"a box must span a step of the {self.grid} x {self.grid} grid",
                layout.boxes[small][0].tolist(),
            )
        return self.write(layout.class_ids, self._steps(layout.boxes))

    def write(self, class_ids: Tensor, sides: Tensor) -> Tensor:
        """Tokens of many layouts at once, whose boxes lie on the grid already; nothing is checked.

        Args:
            class_ids: int64 [..., n], n at most ``max_objects``; below 0 for no object.
            sides: int64 [..., n, 4], left, top, right and bottom in steps of the grid.

        Returns:
            int64 [..., S].
        """
        corners = self.corner_token(sides[..., 0::2], sides[..., 1::2])
        triples = torch.cat([(self.class_start + class_ids)[..., None], corners], dim=-1)
        triples = torch.where((class_ids < 0)[..., None], self.none, triples)
        free = self.max_objects - class_ids.shape[-1]
        triples = F.pad(triples, (0, 0, 0, free), value=self.none)
        crop = self._whole_picture().expand(*class_ids.shape[:-1], -1)
        return torch.cat([triples.flatten(-2), crop], dim=-1)

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of ``write``; nothing is checked, so triples need not be boxes.

        Args:
            tokens: int64 [..., S].

        Returns:
            class_ids int64 [..., n] for all ``max_objects``, -1 where a slot is none; sides int64
            [..., n, 4], of no meaning there.
        """
        triples = tokens[..., : SLOTS_PER_OBJECT * self.max_objects]
        triples = triples.unflatten(-1, (self.max_objects, SLOTS_PER_OBJECT))
        absent = (triples == self.none).any(dim=-1)
        class_ids = torch.where(absent, -1, triples[..., 0] - self.class_start)
        return class_ids, torch.stack(self.corner_place(triples[..., 1:]), dim=-1).flatten(-2)

    def corner_token(self, x: Steps, y: Steps) -> Steps:
        """The token of a corner, x and y in steps of the grid; whole numbers or int64 tensors."""
        return self.coordinate_start + y * self.grid + x

    def corner_place(self, token: Steps) -> tuple[Steps, Steps]:
        """x and y of a corner's token, in steps of the grid."""
        step = token - self.coordinate_start
        return step % self.grid, step // self.grid

    def decode(self, tokens: Tensor) -> Layout:
        """The layout that tokens [S] mean; absent objects may stand anywhere, crops are dropped.

        Raises:
            DiveFastError: another shape, a token that its slot cannot hold, an object that is none
                in part, or a box without size.
        """
        if tokens.dtype != torch.int64 or tokens.shape != (self.n_slots,):
            _fail(
                f"tokens must be int64 of shape [{self.n_slots}]",
                f"{tokens.dtype} {list(tokens.shape)}",
            )
        tokens = tokens.cpu()
        end = SLOTS_PER_OBJECT * self.max_objects
        triples, crop = tokens[:end].view(-1, SLOTS_PER_OBJECT), tokens[end:]
        is_none = triples == self.none
        partly = is_none.any(dim=1) & ~is_none.all(dim=1)
        if partly.any():
            _fail(
                "an object must be none in all three slots or in none", triples[partly][0].tolist()
            )
        present = triples[~is_none.any(dim=1)]
        self._check("class", present[:, 0], self.class_range)
        self._check(
            "coordinate", torch.cat([present[:, 1:].flatten(), crop]), self.coordinate_range
        )
        class_ids, steps = self.read(tokens)
        class_ids, steps = class_ids[class_ids >= 0], steps[class_ids >= 0]
        bad = (steps[:, 2:] <= steps[:, :2]).any(dim=1)
        if bad.any():
            _fail(
                "a box's bottom-right corner must be below and to the right of its top-left one",
                f"(left, top, right, bottom) {steps[bad][0].tolist()} on the grid",
            )
        return Layout((steps / (self.grid - 1)).float(), class_ids)

    def projection(
        self, table: Tensor, metric: str = "l2", min_size: int | tuple[int, int] | None = 1
    ) -> DiscreteProjection:
        """The projection of relaxed embeddings [B, S, D] on valid layouts.

        The crop, where there is one, is always the whole image.

        Args:
            table: the tokens' embeddings, [V, D].
            metric, min_size: see ``DiscreteProjection``; None for independent corners.

        Raises:
            DiveFastError: a table of another number of rows.
        """
        if table.dim() != 2 or len(table) != self.vocabulary_size:
            _fail(f"table must have shape [{self.vocabulary_size}, D]", list(table.shape))
        whole = self._whole_picture()
        free = DiscreteProjection.layout(
            table,
            self.max_objects,
            self.class_range,
            self.coordinate_range,
            self.none,
            extra_coordinates=len(whole),
            metric=metric,
            min_size=min_size,
        )
        ranges = free.ranges.clone()
        ranges[len(ranges) - len(whole) :] = torch.stack([whole, whole + 1], dim=1)
        return replace(free, ranges=ranges)

    def token_names(self) -> tuple[str, ...]:
        """What each token means, such as "dog", "(3, 16)" (x and y on the grid), or both."""
        meanings: list[list[str]] = [[] for _ in range(self.vocabulary_size)]
        for token, name in enumerate(self.names, start=self.class_start):
            meanings[token].append(name)
        for token in range(*self.coordinate_range):
            x, y = self.corner_place(token)
            meanings[token].append(f"({x}, {y})")
        meanings[self.none].append("none")
        return tuple(" or ".join(m) or f"unused {i}" for i, m in enumerate(meanings))

    def to_dict(self) -> dict[str, Any]:
        """All attributes, for JSON."""
        return {**asdict(self), "names": list(self.names)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LayoutFormat:
        """Reads ``to_dict``.

        Raises:
            DiveFastError: an entry is missing, unknown, of another type, or out of range.
        """
        if not isinstance(content, Mapping):
            _fail("a layout format must be a JSON object", shown(content))
        kinds = {"names": list | tuple, "crop": bool}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(content) - known):
            _fail(f"the entries must be among {', '.join(sorted(known))}", unknown[0])
        for name in known:
            kind, value = kinds.get(name, int), content.get(name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                what = "a list" if name == "names" else kind.__name__
                _fail(f"{name} must be given as {what}", shown(value))
            if kind is int and not 0 <= value <= LARGEST:
                _fail(f"{name} must be from 0 to {LARGEST}", shown(value))
        if not all(isinstance(name, str) for name in content["names"]):
            _fail("names must be strings", shown(content["names"]))
        return cls(**content)

    def _steps(self, boxes: Tensor) -> Tensor:
        """The sides of boxes [n, 4] as steps of the grid, int64 [n, 4]."""
        return (boxes.cpu().double() * (self.grid - 1)).round().long()

    def _whole_picture(self) -> Tensor:
        """The crop's tokens for the whole image, int64 [2], or [0] where there is no crop."""
        start, stop = self.coordinate_range
        return torch.tensor([start, stop - 1] if self.crop else [], dtype=torch.int64)

    def _check(self, what: str, tokens: Tensor, allowed: tuple[int, int]) -> None:
        wrong = tokens[(tokens < allowed[0]) | (tokens >= allowed[1])]
        if len(wrong):
            _fail(f"{what} tokens must be in [{allowed[0]}, {allowed[1]})", int(wrong[0]))


def _fail(expected: str, got: object) -> None:
    raise DiveFastError(f"layout: {expected}, but got {got}.")
