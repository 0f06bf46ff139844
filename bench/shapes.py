"""Pictures of one to three coloured shapes, their captions, and captions that are nearly right.

A scene has one to three shapes on 24 x 24 pixels. The first two of a scene with several stand in a
relation (left of, right of, above, below); a third stands aside. The hard negatives are those of
SugarCrepe (arXiv 2306.14610): one word or phrase of the caption is replaced, swapped or added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

SIDE = 24
COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.15, 0.3, 1.0),
    "yellow": (0.95, 0.9, 0.1),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Of the training captions: a colour, or the relation, is left out.
NO_COLOUR, NO_RELATION = 0.15, 0.1


@dataclass(frozen=True)
class Shape:
    """A shape as a caption names it; colour None where the caption does not say."""

    colour: str | None
    shape: str

    def __str__(self) -> str:
        return f"a {self.shape}" if self.colour is None else f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """What a caption says: of two shapes their relation, None for "and"; then others."""

    shapes: tuple[Shape, ...]
    relation: str | None = None

    def __str__(self) -> str:
        text = str(self.shapes[0])
        for number, shape in enumerate(self.shapes[1:]):
            joined = self.relation if number == 0 and self.relation else "and"
            text += f" {joined} {shape}"
        return text


def draw_scene(rng: np.random.Generator, count: int) -> tuple[np.ndarray, Caption]:
    """A picture, uint8 [24, 24, 3], and all that is in it."""
    kinds = rng.choice(len(COLOURS) * len(SHAPES), size=count, replace=False)
    shapes = tuple(
        Shape(tuple(COLOURS)[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)]) for kind in kinds
    )
    relation = _pick(rng, tuple(RELATIONS)) if count > 1 else None
    picture = np.full((SIDE, SIDE, 3), rng.uniform(0.35, 0.5))
    for shape, (x, y) in zip(shapes, _places(rng, count, relation), strict=True):
        share = _cover(shape.shape, x, y, rng.uniform(3.8, 4.8))[..., None]
        colour = np.array(COLOURS[shape.colour]) * rng.uniform(0.85, 1.0)
        picture = (1 - share) * picture + share * colour
    return (picture * 255).round().astype(np.uint8), Caption(shapes, relation)


def training_caption(rng: np.random.Generator, truth: Caption) -> str:
    """One of the true captions of a scene: the pair in either order, words left out at times."""
    shapes, relation = list(truth.shapes), truth.relation
    if len(shapes) > 1 and rng.random() < 0.5:
        shapes[:2], relation = shapes[1::-1], OPPOSITE[relation]
    if rng.random() < NO_RELATION:
        relation = None
    said = (replace(s, colour=None) if rng.random() < NO_COLOUR else s for s in shapes)
    return str(Caption(tuple(said), relation))


def _places(
    rng: np.random.Generator, count: int, relation: str | None
) -> list[tuple[float, float]]:
    """Centres (x, y) in pixels."""
    if count == 1:
        return [tuple(rng.uniform(6, 18, 2))]
    along = rng.uniform(5.0, 7.0), rng.uniform(17.0, 19.0)
    # A third shape needs one side for itself.
    base = rng.uniform(5.5, 18.5) if count == 2 else _pick(rng, (6.0, 18.0))
    across = np.clip(base + rng.uniform(-1.5, 1.5, 2), 5.0, 19.0)
    dx, dy = RELATIONS[relation]
    if dx + dy < 0:
        along = along[::-1]
    places = list(zip(along, across, strict=True))
    if count == 3:
        places.append((rng.uniform(5.5, 18.5), SIDE - base + rng.uniform(-1, 1)))
    return places if dx else [(y, x) for x, y in places]


def _cover(shape: str, x: float, y: float, r: float) -> np.ndarray:
    """The share of each pixel that the shape covers, about; float64 [24, 24] in [0, 1]."""
    across, down = np.meshgrid(np.arange(SIDE) + 0.5 - x, np.arange(SIDE) + 0.5 - y)
    flat, high = np.abs(across), np.abs(down)
    if shape == "circle":
        outside = np.hypot(across, down) - r
    elif shape == "square":
        outside = np.maximum(flat, high) - 0.85 * r
    elif shape == "cross":
        arm = 0.32 * r
        outside = np.minimum(np.maximum(flat - r, high - arm), np.maximum(high - r, flat - arm))
    else:
        outside = np.maximum(0.89 * flat - 0.45 * (down + r), down - 0.8 * r)
    return np.clip(0.5 - outside, 0, 1)


# -- captions that are nearly right ---------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One item of the test.

    Attributes:
        category: as SugarCrepe calls it.
        picture: uint8 [24, 24, 3].
        caption, negative: the right text and the wrong one.
    """

    category: str
    picture: np.ndarray
    caption: str
    negative: str


def make_items(n: int, seed: int) -> list[Item]:
    """So many items, the categories in turn; the same seed makes the same items."""
    rng = np.random.default_rng((seed, 77))
    names = tuple(NEGATIVES)
    return [_item(rng, names[number % len(names)]) for number in range(n)]


def _item(rng: np.random.Generator, category: str) -> Item:
    while True:
        picture, truth = draw_scene(rng, 2 if rng.random() < 0.6 else 3)
        first, second = truth.shapes[:2]
        if first.colour == second.colour or first.shape == second.shape:
            continue  # a swap would say the same again
        said, negative = NEGATIVES[category](rng, truth)
        return Item(category, picture, str(said), str(negative))


def _pair(truth: Caption) -> Caption:
    """What is said of the related two alone."""
    return replace(truth, shapes=truth.shapes[:2])


def _add_att(rng: np.random.Generator, truth: Caption) -> tuple[Caption, Caption]:
    said = _changed(_pair(truth), at := int(rng.integers(2)), colour=None)
    return said, _changed(said, at, colour=_other(rng, COLOURS, truth.shapes[at].colour))


def _add_obj(rng: np.random.Generator, truth: Caption) -> tuple[Caption, Caption]:
    kinds = [Shape(colour, shape) for colour in COLOURS for shape in SHAPES]
    absent = [kind for kind in kinds if kind not in truth.shapes]
    said = _pair(truth)
    return said, replace(said, shapes=(*said.shapes, _pick(rng, absent)))


def _replace_att(rng: np.random.Generator, truth: Caption) -> tuple[Caption, Caption]:
    at = int(rng.integers(len(truth.shapes)))
    return truth, _changed(truth, at, colour=_other(rng, COLOURS, truth.shapes[at].colour))


def _replace_obj(rng: np.random.Generator, truth: Caption) -> tuple[Caption, Caption]:
    at = int(rng.integers(len(truth.shapes)))
    return truth, _changed(truth, at, shape=_other(rng, SHAPES, truth.shapes[at].shape))


def _replace_rel(rng: np.random.Generator, truth: Caption) -> tuple[Caption, Caption]:
    return truth, replace(truth, relation=_other(rng, RELATIONS, truth.relation))


def _swap_att(rng: np.random.Generator, truth: Caption) -> tuple[Caption, Caption]:
    first, second = truth.shapes[:2]
    swapped = replace(first, colour=second.colour), replace(second, colour=first.colour)
    return truth, replace(truth, shapes=(*swapped, *truth.shapes[2:]))


def _swap_obj(rng: np.random.Generator, truth: Caption) -> tuple[Caption, Caption]:
    first, second = truth.shapes[:2]
    return truth, replace(truth, shapes=(second, first, *truth.shapes[2:]))


NEGATIVES: dict[str, Callable[[np.random.Generator, Caption], tuple[Caption, Caption]]] = {
    "add_att": _add_att,
    "add_obj": _add_obj,
    "replace_att": _replace_att,
    "replace_obj": _replace_obj,
    "replace_rel": _replace_rel,
    "swap_att": _swap_att,
    "swap_obj": _swap_obj,
}


def _changed(caption: Caption, at: int, **changes: str | None) -> Caption:
    shapes = list(caption.shapes)
    shapes[at] = replace(shapes[at], **changes)
    return replace(caption, shapes=tuple(shapes))


def _other(rng: np.random.Generator, among, not_this: str) -> str:
    return _pick(rng, tuple(x for x in among if x != not_this))


def _pick(rng: np.random.Generator, among):
    return among[int(rng.integers(len(among)))]
