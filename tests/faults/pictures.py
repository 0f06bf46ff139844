"""Good pictures of many formats, and files of other formats under a picture's name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

# What makes Pillow or another library do more than decode, or is often mistaken for a picture.
OTHERS = {
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
    "dos-eps": b"\xc5\xd0\xd3\xc6"
    + (32).to_bytes(4, "little") * 7
    + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    "pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "heic": (24).to_bytes(4, "big") + b"ftypheic" + bytes(4) + b"mif1heic",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "zip": b"PK\x03\x04" + bytes(26),
    "wmf": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(16),
    "text": b"no picture at all\n",
}


def good(folder: Path) -> Iterator[Path]:
    """Writes pictures of 12 x 9 pixels in every mode that a format has."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(128)
    turned = Image.Exif()
    turned[0x0112] = 6
    wanted: dict[str, tuple[Image.Image, dict]] = {
        "rgb.png": (rgb, {}),
        "alpha.png": (alpha, {}),
        "palette.png": (rgb.quantize(16), {"transparency": 3}),
        "bits.png": (rgb.convert("1"), {}),
        "deep.png": (Image.fromarray(np.arange(108, dtype=np.uint16).reshape(9, 12) * 600), {}),
        "rgb.jpg": (rgb, {"exif": turned}),
        "grey.jpg": (rgb.convert("L"), {"progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "moving.gif": (rgb.quantize(8), {"save_all": True, "append_images": [rgb.quantize(4)]}),
        "rgb.bmp": (rgb, {}),
        "grey.bmp": (rgb.convert("L"), {}),
        "plain.tif": (rgb, {}),
        "packed.tif": (rgb, {"compression": "tiff_lzw"}),
        "deflated.tif": (rgb, {"compression": "tiff_adobe_deflate"}),
        "float.tif": (Image.fromarray(np.linspace(0, 1, 108, dtype=np.float32).reshape(9, 12)), {}),
        "lossy.webp": (rgb, {}),
        "alpha.webp": (alpha, {"lossless": True}),
        "rgb.ppm": (rgb, {}),
        "grey.pgm": (rgb.convert("L"), {}),
    }  # fmt: skip
    for name, (image, options) in wanted.items():
        image.save(folder / name, **options)
        yield folder / name


def foreign(folder: Path) -> Iterator[Path]:
    """Writes other formats, each as a .png and a .jpg."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    contents = dict(OTHERS)
    for kind in (
        "EPS",
        "PDF",
        "ICO",
        "TGA",
        "PCX",
        "SGI",
        "DDS",
        "IM",
        "MSP",
        "XBM",
        "ICNS",
        "JPEG2000",
    ):
        file = io.BytesIO()
        try:
            rgb.convert("1" if kind in ("MSP", "XBM") else "RGB").save(file, kind)
        except (OSError, KeyError, ValueError):  # this Pillow cannot write it
            continue
        contents[kind.lower()] = file.getvalue()
    for number, (name, content) in enumerate(contents.items()):
        path = folder / f"{name}{('.png', '.jpg')[number % 2]}"
        path.write_bytes(content)
        yield path
