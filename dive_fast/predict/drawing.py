"""Boxes and captions on an image."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from dive_fast.data.images import to_mode

_LONG_SIDE = 384  # pixels that a smaller image is enlarged to, so that captions fit
_GOLDEN = (math.sqrt(5) - 1) / 2

Rectangle = tuple[float, float, float, float]


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    captions: Sequence[str],
) -> Image.Image:
    """Draw one outlined box with its caption per object, in a colour of its class.

    Args:
        image: any mode; not changed. A small one is enlarged by a whole factor.
        boxes: left, top, right, bottom in pixels of ``image``.
        classes: one number per box.
        captions: one text per box.

    Returns:
        A new RGB image.
    """
    picture = to_mode(image, 3)
    factor = max(1, math.ceil(_LONG_SIDE / max(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(picture)
    line = max(2, round(max(size) / 250))
    font = ImageFont.load_default(size=max(14, round(max(size) / 40)))
    scaled = [tuple(factor * x for x in box) for box in boxes]
    for box, number in zip(scaled, classes, strict=True):
        left, top, right, bottom = box
        # Edges lie between pixels; the last pixel inside is one before the right edge.
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        canvas.rectangle(corners, outline=class_colour(number), width=line)
    taken: list[Rectangle] = []
    # After all boxes, so that no outline runs through a caption.
    for box, number, caption in zip(scaled, classes, captions, strict=True):
        place = _place(box, _extent(canvas, font, caption), size, taken)
        taken.append(place)
        colour = class_colour(number)
        canvas.rectangle(place, fill=colour)
        canvas.text(place[:2], caption, fill=_ink(colour), font=font)
    return picture


def class_colour(number: int) -> tuple[int, int, int]:
    """A strong colour; those of neighbouring numbers lie far apart on the colour wheel."""
    hue = (0.02 + number * _GOLDEN) % 1.0
    value = (1.0, 0.8)[number // 8 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _extent(canvas: ImageDraw.ImageDraw, font, caption: str) -> tuple[float, float]:
    _, _, right, bottom = canvas.textbbox((0, 0), caption, font=font)
    return right + 1, bottom + 2


def _place(
    box: Sequence[float],
    extent: tuple[float, float],
    size: tuple[int, int],
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Where the caption goes: the first place that covers no other caption, inside the image."""
    places = [_inside(corner, extent, size) for corner in _corners(box, extent)]
    return next((p for p in places if not any(_overlap(p, t) for t in taken)), places[0])


def _corners(box: Sequence[float], extent: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """Above, below, within at the top and at the bottom, each on the left and on the right."""
    left, top, right, bottom = box
    width, height = extent
    for y in (top - height, bottom, top, bottom - height):
        yield left, y
        yield right - width, y


def _inside(
    corner: tuple[float, float], extent: tuple[float, float], size: tuple[int, int]
) -> Rectangle:
    x, y = (
        max(0.0, min(c, limit - length))
        for c, length, limit in zip(corner, extent, size, strict=True)
    )
    return x, y, x + extent[0], y + extent[1]


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever is easier to read on the colour (ITU-R BT.601 luma)."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
