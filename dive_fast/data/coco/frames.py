"""Recognises boxes in another frame than COCO's, which is [left, top, width, height] in pixels.

One box tells nothing: [10, 10, 50, 50] is a box in every frame. All boxes of a file together do,
so everything here looks at the whole file. Measured on COCO val2017 and BCCD: no box reaches out of
its image by more than a pixel; given as corners three in four would, given by their centres more
than one in four. One in eight would pass for corners, seven in ten for centres.
"""

from __future__ import annotations

import numpy as np

from dive_fast.errors import DataError

# Fractions lie in the first pixel; in images of a few pixels real boxes may lie there too.
_LEAST_SIDE = 8
_LOW, _HIGH = -0.01, 1.01  # fractions are rounded when written, and may reach over the border
# What a box may reach over the border: annotation tools round, also after images were resized.
ROUNDING, _ROUNDING_SHARE = 1.0, 0.01
_MANY = 0.2  # share of boxes that reach out, from which on something is wrong with the file
_EXCEPT = 0.01  # share of boxes that are wrong in whatever frame
# Boxes that have to be there for a verdict: (1/8)^3 = 0.2% of three boxes in COCO's frame all pass
# for corners, 0.7^20 = 0.08% of twenty for centres; and a share of them reaches out besides, of
# which one could be a slip. With fewer, or in no known frame, there is only a word.
_CORNERS, _CENTRES, _WORD, _SLIP = 3, 20, 10, 1
_QUARTER = 20  # boxes, all in the upper left quarter of their images: 0.25^20 of scattered ones

EXPECTED = "expected boxes [left, top, width, height] in pixels"


def check_frame(source: object, boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """A word, without a full stop, where the boxes of a file look odd; None where they do not.

    Args:
        source: what a sentence calls the file.
        boxes: float64 [n, 4], finite, as the file gives them.
        sizes: [n, 2], width and height of each box's image.

    Raises:
        DataError: they are fractions of the image's size, its corners, or given by their centres.
    """
    sizes = sizes.astype(np.float64)
    if (form := fractions(boxes, sizes)) is not None:
        raise DataError(
            f"{source}: {EXPECTED}, got fractions of the images' sizes{form}: the coordinates of "
            f"all boxes ({len(boxes):,}) lie in [0, 1]; multiply them by the width and the height."
        )
    n = len(boxes)
    corner, extent = boxes[:, :2], boxes[:, 2:]
    out = ~_inside(corner, corner + np.maximum(extent, 0), sizes)
    n_out = int(out.sum())
    if n_out <= _MANY * n:
        return _quarter(boxes, sizes)
    reach = f"{n_out:,} of {n:,} reach out of their images"
    cornered = _nearly_all(_inside(corner, extent, sizes) & _sized(extent - corner))
    if cornered and n >= _CORNERS and n_out > _SLIP:
        raise DataError(
            f"{source}: {EXPECTED}, got [left, top, right, bottom]: so read all lie in their "
            f"images, but {reach} as they are; subtract left and top from the last two numbers."
        )
    half = extent / 2
    centred = _nearly_all(_inside(corner - half, corner + half, sizes) & _sized(extent))
    if centred and n >= _CENTRES:
        raise DataError(
            f"{source}: {EXPECTED}, got [centre x, centre y, width, height]: so read all lie in "
            f"their images, but {reach} as they are; subtract half the size from the centres."
        )
    if n < (2 if cornered else _WORD):
        return None
    guess = "of images of another size, or turned"
    if cornered or centred:
        guess = "[left, top, right, bottom]" if cornered else "[centre x, centre y, width, height]"
    return f"{EXPECTED}, but {reach}; they may be {guess}"


def fractions(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """Whether boxes of four numbers, in whatever form, are fractions of their images' sizes.

    Several boxes are, or a single one that is not of whole numbers: nobody annotates parts of
    the first pixel. Images of a few pixels do not count.

    Returns:
        None if they are not; else the form, in brackets for a sentence, where only one is possible.
    """
    boxes = boxes[(sizes >= _LEAST_SIDE).all(axis=1)]
    if not len(boxes) or not _nearly_all(((boxes >= _LOW) & (boxes <= _HIGH)).all(axis=1)):
        return None
    if len(boxes) < 3 and (boxes == np.rint(boxes)).all():
        return None
    a, b = boxes[:, :2], boxes[:, 2:]
    forms = {
        "left, top, width, height": a + b <= _HIGH,
        "left, top, right, bottom": b > a,
        "centre x, centre y, width, height": (a - b / 2 >= _LOW) & (a + b / 2 <= _HIGH),
    }
    possible = [form for form, fits in forms.items() if _nearly_all(fits.all(axis=1))]
    return f" [{possible[0]}]" if len(possible) == 1 else ""


def _inside(low: np.ndarray, high: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """bool [n]: which boxes lie in their images, up to rounding."""
    slack = np.maximum(ROUNDING, _ROUNDING_SHARE * sizes)
    return ((low >= -slack) & (high <= sizes + slack)).all(axis=1)


def _sized(extent: np.ndarray) -> np.ndarray:
    return (extent > 0).all(axis=1)


def _nearly_all(good: np.ndarray) -> bool:
    return bool((~good).sum() <= _EXCEPT * len(good))


def _quarter(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """Boxes of smaller copies of the images, or percentages, all lie in one corner."""
    n = len(boxes)
    if n < _QUARTER or ((boxes[:, :2] + boxes[:, 2:]) / sizes > 0.5).any():
        return None
    return (
        f"{EXPECTED}, but all {n:,} lie in the upper left quarter of their images; they may be of "
        "images of another size, or percentages"
    )
