"""What the headers of image files say of annotated boxes: sizes, and how EXIF turns the pixels.

Images are read upright, as viewers, browsers and OpenCV show them, and boxes are taken to be of
the upright image. Where an annotation tool ignored EXIF they are of the stored pixels. A turn by
90 degrees shows in the size and is refused; a mirror image or half a turn does not show, so that
all that can be done is to say so.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dive_fast.data.formats import readable_formats
from dive_fast.data.image_files import exif_orientation

QUARTER_TURNS = range(5, 9)


class Header(NamedTuple):
    """The stored size of an image and its EXIF orientation, 1 where it has none."""

    size: tuple[int, int]
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """The size once EXIF is applied."""
        return self.size[::-1] if self.orientation in QUARTER_TURNS else self.size


def read_header(path: Path) -> Header | None:
    """Without decoding the pixels; None where that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, and of odd metadata
            with Image.open(path, formats=readable_formats()) as image:
                return Header(image.size, exif_orientation(image))
    except Exception:  # damaged headers fail in many ways; reading the image says how
        return None


def misfit(path: Path, annotated: tuple[int, int], upright: tuple[int, int]) -> str:
    """The sentence on an image that has not the size that is annotated.

    Args:
        upright: the size with EXIF applied.
    """
    header = read_header(path)
    if header is not None and header.size == tuple(annotated) and header.upright == tuple(upright):
        return (
            f"{path}: annotated for the {_by(annotated)} pixels that are stored, but EXIF "
            f"(orientation {header.orientation}) turns them by 90 degrees to {_by(upright)}; "
            "annotate the upright image, or remove the EXIF orientation."
        )
    return f"{path}: expected {_by(annotated)} pixels as annotated, got {_by(upright)}."


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
