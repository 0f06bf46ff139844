"""Pictures to try a model on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dive_fast.app.shelf import Entry
from dive_fast.data.paths import expand_inputs
from dive_fast.errors import DataError

MOST = 12
_SCENES = 6
# A digit is enlarged by a power of two, pixel by pixel, so that the model sees it unchanged: images
# are halved with a box filter first.
_FACTOR = 16


def pictures(arguments: Sequence[str]) -> list[str]:
    """The first few of the files that a user names.

    Raises:
        ImageError: an argument gives none.
    """
    found = expand_inputs(arguments)
    for _, error in found:
        if error is not None:
            raise error
    return [path for path, _ in found[:MOST]]


def of_the_zoo(entry: Entry, folder: Path) -> list[str]:
    """Held-out pictures of the zoo's digits and scenes, written to a folder; of others none."""
    make = _MAKERS.get(entry.source.text) if not entry.source.own else None
    if make is None:
        return []
    try:
        made = make()
    except DataError:  # scikit-learn is not installed
        return []
    paths = []
    for name, image in made.items():
        paths.append(str(folder / f"{name}.png"))
        image.save(paths[-1])
    return paths


def _digits() -> dict[str, Image.Image]:
    from dive_fast.data.digits import NAMES, load_digits

    part = load_digits("test")
    size = tuple(side * _FACTOR for side in part.images.shape[1:])
    first = {name: (part.labels == label).argmax() for label, name in enumerate(NAMES)}
    images = {name: Image.fromarray(part.images[i]) for name, i in first.items()}
    return {name: im.resize(size, Image.Resampling.NEAREST) for name, im in images.items()}


def _scenes() -> dict[str, Image.Image]:
    from dive_fast.data.scenes import load_scenes

    images = load_scenes("test", _SCENES).images
    return {f"scene {i + 1}": Image.fromarray(image) for i, image in enumerate(images)}


_MAKERS = {"digits": _digits, "scenes": _scenes}
