"""Decoding image files: what lies on disk, or in an archive, as upright PIL images."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings

from PIL import Image

from dive_fast.data.formats import HEAD, other_kind, readable_formats
from dive_fast.data.quiet import native_stderr_closed
from dive_fast.errors import ImageError

MAX_PIXELS = 89_478_485  # Pillow's own default: a quarter of a gigabyte as RGB
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read and decode one image file, turned upright by its EXIF orientation.

    The whole file is decoded here, so that a truncated one fails here and not later. Of an
    animation the first frame is read. The content says which of ``formats.FORMATS`` it is,
    whatever the file is called.

    Raises:
        ImageError: the file is missing, a directory, empty, truncated, no image, of a format that
            is not read, or has more than ``MAX_PIXELS`` pixels.
    """
    path = os.fsdecode(path)
    _check_file(path)
    return _read(path, path)


def decode_image(content: bytes, name: str) -> Image.Image:
    """As ``read_image``, of a file's content that lies elsewhere, such as in an archive.

    Args:
        content: the bytes of the file.
        name: what a sentence calls it.

    Raises:
        ImageError: as ``read_image``.
    """
    if not content:
        raise ImageError(f"{name}: expected an image file, got an empty one (0 bytes).")
    return _read(io.BytesIO(content), name)


def _read(source: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # decoded() refuses by our own limit, which does not depend on Pillow's global one.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=readable_formats())
    except Image.UnidentifiedImageError as error:
        found = other_kind(_head(source)) or "a file of no known image format"
        raise ImageError(f"{name}: expected an image, got {found}.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got more.") from error
    except Exception as error:  # decoders meet damaged headers with whatever they trip over
        raise ImageError(f"{name}: cannot be read ({_reason(error)}).") from error
    with image:
        return decoded(image, name)


def decoded(image: Image.Image, name: str) -> Image.Image:
    """An opened image with its pixels decoded and its EXIF orientation applied.

    Raises:
        ImageError: it is truncated or damaged, or has more than ``MAX_PIXELS`` pixels; the sentence
            begins with ``name``.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{name}: expected at most {MAX_PIXELS:,} pixels, got {by(image.size)} = "
            f"{image.width * image.height:,}."
        )
    try:
        with native_stderr_closed() if image.format == "TIFF" else contextlib.nullcontext():
            image.load()
    except Exception as error:  # decoders meet damaged data with whatever they trip over
        raise ImageError(f"{name}: truncated or damaged ({_reason(error)}).") from error
    method = _UPRIGHT.get(exif_orientation(image))
    if method is None:
        return image
    upright = image.transpose(method)
    # The orientation is used up; only what the pixels need to be understood stays.
    upright.info = {k: v for k, v in image.info.items() if k == "transparency"}
    return upright


def exif_orientation(image: Image.Image) -> int:
    """How EXIF turns the stored pixels, 1 to 8; 1, upright, where it does not say."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # a damaged EXIF block does not make the pixels unreadable
        return 1
    return int(orientation) if orientation in _UPRIGHT else 1


def by(size: tuple[int, int]) -> str:
    """A size for a sentence."""
    return f"{size[0]} x {size[1]}"


def _check_file(path: str) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(f"{path!r}: cannot be read ({_reason(error)}).") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{path}: expected an image file, got a directory.")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path}: expected an image file, got a device, pipe or socket.")
    if status.st_size == 0:
        raise ImageError(f"{path}: expected an image file, got an empty one (0 bytes).")


def _head(source: str | io.BytesIO) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:HEAD]
    try:
        with open(source, "rb") as file:
            return file.read(HEAD)
    except OSError:  # it was there a moment ago
        return b""


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).rstrip(".")
