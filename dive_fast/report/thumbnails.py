"""Small copies of images, as ``data:`` addresses that need no file beside the page."""

from __future__ import annotations

import base64
import io

from PIL import Image

from dive_fast.data.images import to_mode

SMALL = 64  # pixels of the longer side up to which an image is kept as it is, and enlarged


def thumbnail(image: Image.Image, side: int) -> tuple[str, tuple[int, int], bool]:
    """A copy whose longer side has at most ``side`` pixels.

    Returns:
        (address, (width, height) on the page, whether its pixels are to be seen).

    Raises:
        ImageError: a mode that cannot be shown.
    """
    image = to_mode(image, 1 if image.mode in ("1", "L", "I", "I;16", "F") else 3)
    pixelated = max(image.size) <= SMALL
    if not pixelated:
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    # Lines and letters of a few pixels: JPEG would blur them, and saves nothing.
    address = _address(image, "PNG") if pixelated else _address(image, "JPEG", quality=80)
    factor = side / max(image.size) if pixelated else 1
    width, height = (max(1, round(s * factor)) for s in image.size)
    return address, (width, height), pixelated


def _address(image: Image.Image, form: str, **options: int) -> str:
    file = io.BytesIO()
    image.save(file, form, optimize=True, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
