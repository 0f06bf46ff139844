"""Which image formats are read, and what other files are called in a sentence.

Pillow knows some 40 formats and chooses by the content, whatever the file's name. Of those that it
has, PostScript starts another program (Ghostscript) on the file, and others are read by nobody who
classifies images: only the formats here are tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

# Pillow's name of each format that is read, with the suffixes that its files have.
FORMATS: dict[str, tuple[str, ...]] = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
    "MPO": (".mpo",),  # several JPEGs, of which the first is read
    "PCX": (".pcx",),
    "PNG": (".png", ".apng"),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
HEAD = 1024  # bytes that ``other_kind`` wants to see


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow knows, for ``Image.open(formats=...)``."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _Kind(NamedTuple):
    """A kind of file that is not read: how its content begins, and what a sentence says of it."""

    name: str
    matches: Callable[[bytes], bool]
    is_picture: bool = True  # a program can make a JPEG or PNG of it


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(starts)


def _brand(*brands: bytes) -> Callable[[bytes], bool]:
    """Of the containers of the MPEG family: their major brand stands at byte 8."""
    return lambda head: head[4:8] == b"ftyp" and head[8:12].lower() in brands


def _markup(*tags: bytes) -> Callable[[bytes], bool]:
    def matches(head: bytes) -> bool:
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        return text.startswith(b"<") and any(tag in text for tag in tags)

    return matches


_KINDS = (
    _Kind("PostScript", _begins(b"%!PS", b"\xc5\xd0\xd3\xc6", b"\x04%!PS")),
    _Kind("PDF", lambda head: b"%PDF-" in head),
    _Kind("HEIC", _brand(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")),
    _Kind("AVIF", _brand(b"avif", b"avis")),  # where this Pillow has no decoder
    _Kind("JPEG XL", _begins(b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")),
    _Kind("Canon raw", _brand(b"crx ")),
    _Kind("video", lambda head: head[4:8] == b"ftyp", False),
    _Kind("video", lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ", False),
    _Kind("video", _begins(b"\x1a\x45\xdf\xa3"), False),
    _Kind("SVG", _markup(b"<svg")),
    _Kind("web page", _markup(b"<html", b"<!doctype html"), False),
    _Kind("Photoshop", _begins(b"8BPS")),
    _Kind("GIMP", _begins(b"gimp xcf")),
    _Kind("icon (ICO)", _begins(b"\x00\x00\x01\x00", b"\x00\x00\x02\x00")),
    _Kind("icon (ICNS)", _begins(b"icns")),
    _Kind("Windows metafile", _begins(b"\xd7\xcd\xc6\x9a")),
    _Kind("Windows metafile", lambda head: head[40:44] == b" EMF"),
    _Kind("DDS", _begins(b"DDS ")),
    _Kind("OpenEXR", _begins(b"\x76\x2f\x31\x01")),
    _Kind("Radiance HDR", _begins(b"#?RADIANCE", b"#?RGBE")),
    _Kind("FITS", _begins(b"SIMPLE  =")),
    _Kind("DjVu", _begins(b"AT&TFORM")),
    _Kind("SGI", _begins(b"\x01\xda")),
    _Kind("XPM", _begins(b"/* XPM */")),
    _Kind("HDF5", _begins(b"\x89HDF\r\n\x1a\n"), False),
    _Kind("DICOM", lambda head: head[128:132] == b"DICM"),
    _Kind("numpy array", _begins(b"\x93NUMPY"), False),
    _Kind("zip archive", _begins(b"PK\x03\x04"), False),
    _Kind("gzip archive", _begins(b"\x1f\x8b"), False),
    _Kind("Git LFS pointer", _begins(b"version https://git-lfs"), False),
)


def other_kind(head: bytes) -> str | None:
    """What a file of a format that is not read is, by its first ``HEAD`` bytes.

    Returns:
        The end of a sentence such as "PostScript, which is not read; convert it to JPEG or PNG",
        or None where the content tells nothing.
    """
    for kind in _KINDS:
        if kind.matches(head):
            advice = "; convert it to JPEG or PNG" if kind.is_picture else ""
            article = "" if kind.is_picture else "a "
            return f"{article}{kind.name}{', which is not read' if advice else ''}{advice}"
    return None
