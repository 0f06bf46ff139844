"""Scenes of real handwritten digits: 32 x 32 pixels, one to four digits, a box around each.

The digits are scikit-learn's (``dive_fast.data.digits``), enlarged, light on dark; where two touch,
the lighter pixel counts. Training scenes show the 1,400 training digits, each drawn anew with a
little tilt and shear; test scenes show the 397 held-out digits as they are.

Every box is tight around its digit and lies on the grid of 17 x 17 corners, 2 pixels apart.

The layouts have a structure that a prior can learn: most scenes are one or two rows of digits that
stand on one line, of one height, with a small gap; the right neighbour of a digit is often the next
digit (after nine comes zero), sometimes the same again. The rest lie anywhere; overlap is rare.

A few training scenes are empty canvases, so that a layout without objects means just that; test
scenes have one digit at least.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dive_fast.data.coco import CocoDataset, CocoImage, read_coco, write_coco
from dive_fast.data.digits import NAMES, load_digits
from dive_fast.errors import DataError

__all__ = [
    "CANVAS",
    "GRID",
    "MAX_OBJECTS",
    "NAMES",
    "SceneMaker",
    "Scenes",
    "load_masks",
    "load_scenes",
    "scenes_dataset",
    "write_scenes",
]

CANVAS = 32
GRID = 17
MAX_OBJECTS = 4
STEP = CANVAS // (GRID - 1)  # pixels between two corners of the grid
TEST_SEED = 20_000
N_TEST = 1000
ANNOTATIONS, IMAGES = "annotations.json", "images"  # what write_scenes calls its files

SMALLEST, LARGEST = 8, 18  # a digit's height in pixels
COUNTS = (1,) * 3 + (2,) * 5 + (3,) * 6 + (4,) * 6  # one of them is drawn
EMPTY_CHANCE = 0.03  # of a training scene without digits
LOOSE_CHANCE = 0.25  # of a scene whose digits lie anywhere
NEXT_CHANCE, SAME_CHANCE = 0.5, 0.2  # that the right neighbour is the next, or the same, digit
GAPS = (-2,) + (0,) * 7 + (2,) * 9 + (4,) * 3  # pixels between neighbours; one is drawn
MOST_COVERED = 0.15  # of the smaller of two boxes, in a loose scene

INK = 0.2  # grey level that counts as part of the digit
_RAISED = 24  # the size at which a digit is tilted and cut out
_TILT, _SHEAR = math.radians(8.0), 0.1


class Scenes(NamedTuple):
    """Images with their objects; scene n has the objects 0 to counts[n] - 1.

    Attributes:
        images: uint8 [N, 32, 32].
        boxes: int64 [N, 4, 4], x1, y1, x2, y2 in pixels, even numbers; zero where no object is.
        class_ids: int64 [N, 4]; -1 where no object is.
    """

    images: np.ndarray
    boxes: np.ndarray
    class_ids: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """int64 [N], the number of objects of every scene."""
        return (self.class_ids >= 0).sum(axis=1)


class SceneMaker:
    """Makes scenes of the digits of one part; the same seed makes the same scenes.

    Args:
        part: "train" or "test".

    Raises:
        DataError: another part is asked for, or scikit-learn is not installed.
    """

    def __init__(self, part: str) -> None:
        if part not in ("train", "test"):
            raise DataError(f"the scenes have the parts 'train' and 'test', got {part!r}.")
        pictures, labels = load_digits(part)
        self._training = part == "train"
        small = torch.from_numpy(pictures).float().div(255).unsqueeze(1)
        size = (_RAISED, _RAISED)
        raised = F.interpolate(small, size, mode="bicubic", align_corners=False)
        self._digits = raised.clamp(0, 1)
        left, top, right, bottom = _ink_bounds(self._digits).unbind(1)
        self._aspects = ((right - left) / (bottom - top)).tolist()
        self._of_class = [np.flatnonzero(labels == c).tolist() for c in range(len(NAMES))]

    def __call__(self, n: int, seed: int | tuple[int, ...]) -> Scenes:
        """``n`` scenes.

        Raises:
            DataError: ``n`` is below 1.
        """
        boxes, class_ids, chosen, rng = self._place(n, seed)
        canvas, _ = self._paint(boxes, class_ids, chosen, rng)
        return Scenes(canvas.mul(255).round_().byte().numpy(), boxes, class_ids)

    def masks(self, n: int, seed: int | tuple[int, ...]) -> np.ndarray:
        """The class of every pixel of the same scenes, int64 [n, 32, 32]; 10 for the background.

        A pixel shows a digit where that one's ink has more than a fifth of its strongest (``INK``),
        and of several digits the one that is lighter there.
        """
        boxes, class_ids, chosen, rng = self._place(n, seed)
        _, shows = self._paint(boxes, class_ids, chosen, rng)
        names = np.concatenate([class_ids[class_ids >= 0], [len(NAMES)]])
        return names[shows.numpy()]

    def layouts(self, n: int, seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The boxes and class_ids of the same scenes, without painting them.

        Raises:
            DataError: ``n`` is below 1.
        """
        boxes, class_ids, _, _ = self._place(n, seed)
        return boxes, class_ids

    def _place(
        self, n: int, seed: int | tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
        """Boxes, classes and digits of n scenes, and the generator where it stands then."""
        if n < 1:
            raise DataError(f"expected at least 1 scene, got {n}.")
        rng = np.random.default_rng(seed)
        boxes = np.zeros((n, MAX_OBJECTS, 4), dtype=np.int64)
        class_ids = np.full((n, MAX_OBJECTS), -1, dtype=np.int64)
        chosen = np.zeros((n, MAX_OBJECTS), dtype=np.int64)
        for scene in range(n):
            classes, chosen_digits, placed = self._layout(rng)
            count = len(classes)
            class_ids[scene, :count] = classes
            chosen[scene, :count] = chosen_digits
            if count:
                boxes[scene, :count] = placed
        return boxes, class_ids, chosen, rng

    def _layout(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[list[int]]]:
        """Classes, digits and boxes of one scene."""
        # Only where scenes may be empty is a number drawn for it: the test scenes stay as they are.
        if self._training and rng.random() < EMPTY_CHANCE:
            return [], [], []
        count = _pick(rng, COUNTS)
        loose = rng.random() < LOOSE_CHANCE
        classes = _neighbours(rng, count, linked=not loose)
        chosen = [_pick(rng, self._of_class[c]) for c in classes]
        aspects = [self._aspects[digit] for digit in chosen]
        boxes = None
        while boxes is None:  # a draw that does not fit on the canvas is drawn again
            boxes = _scatter(rng, aspects) if loose else _align(rng, aspects)
        return classes, chosen, boxes

    def _paint(
        self,
        boxes: np.ndarray,
        class_ids: np.ndarray,
        chosen: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Grey levels float32 [n, 32, 32], and whose ink is seen, int64; -1 for nobody's.

        Objects are counted through all scenes.
        """
        scenes, slots = np.nonzero(class_ids >= 0)
        if len(scenes) == 0:
            empty = torch.zeros(len(boxes), CANVAS, CANVAS)
            return empty, torch.full_like(empty, -1, dtype=torch.int64)
        inside = torch.from_numpy(boxes[scenes, slots])
        digits = self._digits[torch.from_numpy(chosen[scenes, slots])]
        if self._training:
            digits = _tilt(digits, rng)
        light = torch.from_numpy(rng.uniform(0.75, 1.0, len(scenes))).float()
        ink = _cut_out(digits, inside)
        painted = ink * light[:, None, None]
        # A margin, so that the square around a box never ends outside.
        side = CANVAS + LARGEST
        canvas = torch.zeros(len(boxes) * side * side)
        square = torch.arange(LARGEST)
        row = torch.from_numpy(scenes)[:, None] * side + inside[:, 1:2] + square
        index = row[:, :, None] * side + (inside[:, 0:1] + square)[:, None]
        canvas.scatter_reduce_(0, index.flatten(), painted.flatten(), "amax")
        seen = ink > INK * ink.amax(dim=(1, 2), keepdim=True)
        seen &= painted == canvas[index]
        whose = torch.full_like(canvas, -1, dtype=torch.int64)
        number = torch.arange(len(scenes))[:, None, None].expand_as(index)
        whose[index[seen]] = number[seen]
        canvas, whose = (each.view(-1, side, side) for each in (canvas, whose))
        return canvas[:, :CANVAS, :CANVAS], whose[:, :CANVAS, :CANVAS]


def load_scenes(part: str, n: int = N_TEST) -> Scenes:
    """The first ``n`` of a fixed list of scenes: for "test", of the held-out digits.

    A shorter list is the beginning of a longer one.

    Raises:
        DataError: another part is asked for, ``n`` is below 1, or scikit-learn is not installed.
    """
    make = SceneMaker(part)
    single = [make(1, seed) for seed in _seeds(part, n)]
    return Scenes(*(np.concatenate(arrays) for arrays in zip(*single, strict=True)))


def load_masks(part: str, n: int = N_TEST) -> np.ndarray:
    """The class of every pixel of ``load_scenes``'s, int64 [N, 32, 32]; 10 for the background."""
    make = SceneMaker(part)
    return np.concatenate([make.masks(1, seed) for seed in _seeds(part, n)])


def _seeds(part: str, n: int) -> list[tuple[int, int]]:
    """Of each scene of the fixed list."""
    if n < 1:
        raise DataError(f"expected at least 1 scene, got {n}.")
    return [(TEST_SEED + (part == "train"), index) for index in range(n)]


def write_scenes(
    folder: str | os.PathLike[str], part: str = "test", n: int = N_TEST
) -> CocoDataset:
    """Writes the first ``n`` scenes of a part: ``images/*.png`` and ``annotations.json``.

    What is written is always the same, so it may be written again over itself.

    Returns:
        The data set as ``read_coco`` reads it back.

    Raises:
        DataError: another part is asked for, ``n`` is below 1, scikit-learn is not installed, or
            the folder cannot be written.
    """
    made, folder = load_scenes(part, n), Path(folder)
    pictures = folder / IMAGES
    dataset = scenes_dataset(made, pictures, f"scenes ({part})")
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for picture, image in zip(made.images, dataset.images, strict=True):
            Image.fromarray(picture).save(image.path)
    except OSError as error:
        raise DataError(
            f"{folder}: the scenes cannot be written ({error.strerror or error})."
        ) from error
    write_coco(folder / ANNOTATIONS, dataset, pictures)
    # The folder may be gone tomorrow; the scenes can be made again.
    return replace(read_coco(folder / ANNOTATIONS, pictures), where={"annotations": "scenes"})


def scenes_dataset(made: Scenes, pictures: Path, source: str) -> CocoDataset:
    """Scenes as a data set whose images are to lie in a folder; ids count from 1."""
    images = []
    for index, count in enumerate(made.counts.tolist()):
        images.append(
            CocoImage(
                id=index + 1,
                path=pictures / f"{index + 1:06}.png",
                size=(CANVAS, CANVAS),
                boxes=torch.from_numpy(made.boxes[index, :count]).float(),
                class_ids=torch.from_numpy(made.class_ids[index, :count]),
                crowd=torch.zeros(count, dtype=torch.bool),
            )
        )
    return CocoDataset(NAMES, tuple(range(1, len(NAMES) + 1)), tuple(images), source)


def _pick(rng: np.random.Generator, among: Sequence[int]) -> int:
    return among[int(rng.random() * len(among))]


def _neighbours(rng: np.random.Generator, count: int, linked: bool) -> list[int]:
    """Classes from left to right; linked ones follow the company that digits like."""
    classes = [_pick(rng, range(len(NAMES))) for _ in range(count)]
    for i in range(1, count if linked else 0):
        u = rng.random()
        if u < NEXT_CHANCE:
            classes[i] = (classes[i - 1] + 1) % len(NAMES)
        elif u < NEXT_CHANCE + SAME_CHANCE:
            classes[i] = classes[i - 1]
    return classes


def _width(height: int, aspect: float) -> int:
    """The width on the grid that comes nearest to the digit's own form."""
    return min(LARGEST, max(2 * STEP, STEP * round(height * aspect / STEP)))


def _on_grid(rng: np.random.Generator, low: int, high: int) -> int:
    """An even number of pixels in [low, high]."""
    return STEP * _pick(rng, range(low // STEP, high // STEP + 1))


def _align(rng: np.random.Generator, aspects: list[float]) -> list[list[int]] | None:
    """One row, or two rows of at most two, each on one line and of one height."""
    two_rows = len(aspects) > 2 and rng.random() < 0.5
    split = [aspects[:2], aspects[2:]] if two_rows else [aspects]
    heights = [_on_grid(rng, SMALLEST, LARGEST if len(split) == 1 else 14) for _ in split]
    between = _on_grid(rng, 0, 4)
    free = CANVAS - sum(heights) - between * (len(split) - 1)
    if free < 0:
        return None
    top, left, boxes = _on_grid(rng, 0, free), None, []
    for row, height in zip(split, heights, strict=True):
        widths = [_width(height, aspect) for aspect in row]
        gaps = [_pick(rng, GAPS) for _ in row[1:]]
        room = CANVAS - sum(widths) - sum(gaps)
        if room < 0:
            return None
        # Two rows begin at one place where they can.
        left = _on_grid(rng, 0, room) if left is None else min(left, room)
        x = left
        for width, gap in zip(widths, [*gaps, 0], strict=True):
            boxes.append([x, top, x + width, top + height])
            x += width + gap
        top += height + between
    return boxes


def _scatter(rng: np.random.Generator, aspects: list[float]) -> list[list[int]] | None:
    """Digits of any size anywhere, hardly covering each other."""
    boxes: list[list[int]] = []
    for aspect in aspects:
        height = _on_grid(rng, SMALLEST, LARGEST)
        width = _width(height, aspect)
        for _ in range(20):
            x, y = _on_grid(rng, 0, CANVAS - width), _on_grid(rng, 0, CANVAS - height)
            box = [x, y, x + width, y + height]
            if all(_covered(box, other) <= MOST_COVERED for other in boxes):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _covered(box: list[int], other: list[int]) -> float:
    """The share of the smaller box that lies in the other one."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    area = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return max(0, width) * max(0, height) / area


def _ink_bounds(digits: torch.Tensor) -> torch.Tensor:
    """x1, y1, x2, y2 of the ink, [N, 4] in pixels; digits [N, 1, h, w] in [0, 1]."""
    inked = digits[:, 0] > INK * digits.amax(dim=(1, 2, 3))[:, None, None]
    bounds = []
    for along in (1, 2):
        line = inked.any(dim=along).int()
        bounds.append((line.argmax(dim=1), line.shape[1] - line.flip(1).argmax(dim=1)))
    (left, right), (top, bottom) = bounds
    return torch.stack([left, top, right, bottom], dim=1)


def _tilt(digits: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Each digit with a little rotation and shear of its own."""
    n = len(digits)
    angle = torch.from_numpy(rng.uniform(-_TILT, _TILT, n)).float()
    shear = torch.from_numpy(rng.uniform(-_SHEAR, _SHEAR, n)).float()
    # Made smaller by a tenth, so that no corner leaves the image.
    cos, sin, zero = 1.1 * angle.cos(), 1.1 * angle.sin(), torch.zeros(n)
    rows = [cos, shear * cos - sin, zero, sin, shear * sin + cos, zero]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(digits.shape), False)
    return F.grid_sample(digits, grid, align_corners=False)


def _cut_out(digits: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The ink of each digit stretched to the size of its box: [N, 18, 18], zero beyond it."""
    bounds = _ink_bounds(digits).float()
    size = (boxes[:, 2:] - boxes[:, :2]).float()
    # Where a pixel's centre lies in its box, [N, 2, 18] in [0, 1]; from there in the image.
    share = (torch.arange(LARGEST) + 0.5) / size[:, :, None]
    ink = bounds[:, :2, None] + share * (bounds[:, 2:] - bounds[:, :2])[:, :, None]
    x, y = (ink * 2 / digits.shape[-1] - 1).unbind(1)
    grid = torch.stack(
        [x[:, None].expand(-1, LARGEST, -1), y[:, :, None].expand(-1, -1, LARGEST)], dim=3
    )
    painted = F.grid_sample(digits, grid, align_corners=False)[:, 0]
    across, down = (share < 1).unbind(1)
    return painted * across[:, None] * down[:, :, None]
