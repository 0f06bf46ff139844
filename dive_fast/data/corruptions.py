"""Corrupted pictures, ImageNet-C's kinds in five severities (arXiv 1903.12261).

What a picture becomes depends on its id, the corruption and the seed alone: not on the order of the
pictures, nor on the process that reads them. docs/corruptions.md has the rules for small pictures.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
from PIL import Image

from dive_fast.core.numbers import is_whole, whole_seed
from dive_fast.data.examples import DataSet, Example, LazyExamples, Picture
from dive_fast.data.images import MAX_PIXELS, as_image, by, center_crop, to_mode
from dive_fast.errors import DataError, DiveFastError, ImageError, shown

GROUPS: Mapping[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
# ImageNet-C's fifteen; what it tunes with is only in "extra".
ALL = tuple(name for group, names in GROUPS.items() if group != "extra" for name in names)
NAMES = (*ALL, *GROUPS["extra"])
SEVERITIES = (1, 2, 3, 4, 5)

# Their parameters are shares and gray levels, which mean the same at every size. Those of all
# others are lengths in pixels of a picture of this side.
OF_ANY_SIZE = frozenset(
    (*GROUPS["noise"], "speckle_noise", "brightness", "contrast", "saturate")
    + ("pixelate", "jpeg_compression")
)
REFERENCE = 224
SMALLEST = 8  # a pixelated one would have none left

PACKAGE = "imagecorruptions-imaug"
# They draw from generators of their own unless they are told.
_SEEDED = ("impulse_noise", "glass_blur")
# The others draw from numpy's common generator, which is lent to one at a time.
_LENT = threading.Lock()


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity, applied to pictures.

    Attributes:
        name: one of ``NAMES``.
        severity: 1 to 5.
        seed: of what it draws, with the picture's id.

    Raises:
        DiveFastError: there is no such corruption.
    """

    name: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise DiveFastError(
                f"expected a corruption of {', '.join(NAMES)}, got {shown(self.name)}."
            )
        if not is_whole(self.severity) or self.severity not in SEVERITIES:
            raise DiveFastError(f"expected a severity of 1 to 5, got {shown(self.severity)}.")
        whole_seed(self.seed)

    def __str__(self) -> str:
        return f"{self.name}-{self.severity}"

    def __call__(self, picture: Image.Image, key: str) -> Image.Image:
        """The corrupted picture, of the same mode and size.

        Args:
            picture: of mode L or RGB.
            key: the picture's id.

        Raises:
            ImageError: it is too small, or too long and thin.
            DiveFastError: the package is not installed, or the corruption changes nothing.
        """
        function = _functions()[self.name]
        if min(picture.size) < SMALLEST:
            raise ImageError(
                f"expected a picture of at least {by((SMALLEST, SMALLEST))} to corrupt, got one of "
                f"{by(picture.size)}."
            )
        self.expect_effect(len(picture.getbands()))
        if self.name in OF_ANY_SIZE:
            return self._drawn(function, picture, key)
        # Some of these know no grey.
        large = _enlarged(picture).convert("RGB")
        found = self._drawn(function, large, key).convert(picture.mode)
        return found.resize(picture.size, Image.Resampling.BOX)

    def expect_effect(self, channels: int) -> None:
        """That it changes pictures of so many channels.

        Raises:
            DiveFastError: it does not.
        """
        if self.name == "saturate" and channels == 1:
            raise DiveFastError("saturate changes nothing in grey pictures: leave it out.")

    def identity(self) -> dict[str, Any]:
        """What decides the pictures, for JSON.

        Raises:
            DiveFastError: the package is not installed.
        """
        return {
            "name": self.name,
            "severity": self.severity,
            "seed": self.seed,
            "package": f"{PACKAGE} {_version()}",
        }

    def _drawn(self, function: Callable[..., Any], picture: Image.Image, key: str) -> Image.Image:
        text = f"{self.seed} {self.name} {self.severity} {key}"
        words = np.frombuffer(hashlib.sha256(text.encode(errors="surrogatepass")).digest(), "<u4")
        given = {"seed": int(words[0])} if self.name in _SEEDED else {}
        with _LENT:
            before = np.random.get_state()
            np.random.seed(words)
            try:
                found = np.asarray(function(picture, self.severity, **given))
            finally:
                np.random.set_state(before)
        if not np.isfinite(found).all():
            raise ImageError(f"{self} gives no finite pixels of a picture of {by(picture.size)}.")
        return Image.fromarray(found.clip(0, 255).astype(np.uint8))


def read_corruptions(texts: Iterable[str], seed: int = 0) -> list[Corruption]:
    """The corruptions that texts name, in their order, each once.

    Args:
        texts: NAME or NAME:SEVERITY, where NAME is a corruption, a group of ``GROUPS`` or "all",
            and SEVERITY is such as 3 or 1-5; without it all five.
        seed: as ``Corruption``.

    Raises:
        DiveFastError: it is no such text.
    """
    found: dict[Corruption, None] = {}
    for text in texts:
        name, colon, severities = text.partition(":")
        names = (name,) if name in NAMES else ALL if name == "all" else GROUPS.get(name)
        if names is None:
            raise DiveFastError(
                f"expected a corruption of {', '.join(NAMES)}, a group of {', '.join(GROUPS)}, or "
                f"all, got {shown(name)}."
            )
        chosen = _severities(severities, text) if colon else SEVERITIES
        found |= dict.fromkeys(Corruption(n, severity, seed) for n in names for severity in chosen)
    return list(found)


def expect_corruptions() -> None:
    """That the package is there.

    Raises:
        DiveFastError: it is not, or cannot be loaded.
    """
    _version()
    _functions()


def corrupted(
    dataset: DataSet,
    name: str,
    severity: int,
    *,
    image_shape: Sequence[int] | None = None,
    seed: int = 0,
) -> DataSet:
    """The same data set with corrupted images.

    Each image is corrupted when it is loaded, by its id: the same in every order, subset, shard and
    process.

    Args:
        name: of the corruption, one of ``corruptions.NAMES``.
        severity: 1 to 5.
        image_shape: (channels, side, side) of what a model sees, ``clf.model.image_shape``: images
            are cropped and resized to it before they are corrupted, as ImageNet-C's were, and the
            model then sees them unchanged. None: corrupted in their own size, grey or RGB.
        seed: of what the corruption draws.

    Raises:
        DataError: the data set is corrupted already.
        DiveFastError: there is no such corruption, ``image_shape`` is none, or imagecorruptions-
            imaug is not installed.
    """
    if dataset.corruption is not None:
        raise DataError(f"{dataset.name}: expected clean images, got such as are corrupted.")
    corruption = Corruption(name, severity, seed)
    view = None if image_shape is None else _view(image_shape)
    if view is not None:
        corruption.expect_effect(view[0])
    expect_corruptions()
    change = partial(_corrupted, corruption, view)
    examples = dataset.examples
    if isinstance(examples, LazyExamples):
        examples = examples.changed(change)
    else:
        examples = [_changed(example, change) for example in examples]
    told = corruption.identity()
    if image_shape is not None:
        told["image_shape"] = list(image_shape)
    return replace(dataset, examples=examples, corruption=told)


def corrupted_again(dataset: DataSet, told: Mapping[str, Any]) -> DataSet:
    """A clean data set corrupted as another one was.

    Args:
        told: its ``corruption``.

    Raises:
        DiveFastError: as ``corrupted``.
    """
    name, severity, seed = (told.get(key) for key in ("name", "severity", "seed"))
    image_shape = told.get("image_shape")
    return corrupted(dataset, name, severity, image_shape=image_shape, seed=seed)


def _changed(example: Example, change: Callable[..., Picture]) -> Example:
    return replace(example, load=partial(change, example.load, example.id))


def _corrupted(
    corruption: Corruption,
    view: tuple[int, int] | None,
    load: Callable[[], Picture],
    key: str,
) -> Image.Image:
    picture = as_image(load())
    if view is None:
        grey = picture.mode in ("1", "L", "F") or picture.mode.startswith("I")
        return corruption(to_mode(picture, 1 if grey else 3), key)
    channels, size = view
    return corruption(center_crop(to_mode(picture, channels), size), key)


def _view(image_shape: Any) -> tuple[int, int]:
    """Channels and side.

    Raises:
        DiveFastError: it is no shape of square images.
    """
    given = tuple(image_shape) if isinstance(image_shape, list | tuple) else ()
    whole = len(given) == 3 and all(map(is_whole, given))
    if not whole or given[0] not in (1, 3) or given[1] != given[2] or given[1] < SMALLEST:
        raise DiveFastError(
            "expected an image_shape (channels, side, side) of 1 or 3 channels and a side of at "
            f"least {SMALLEST}, got {shown(image_shape)}."
        )
    return int(given[0]), int(given[1])


def _severities(text: str, whole: str) -> range:
    match = re.fullmatch(r"([1-5])(?:-([1-5]))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise DiveFastError(
            f"expected a severity of 1 to 5 or a range of such as 1-3 behind the colon, got "
            f"{shown(whole)}."
        )
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _enlarged(picture: Image.Image) -> Image.Image:
    """With a shorter side of at least ``REFERENCE``."""
    scale = REFERENCE / min(picture.size)
    if scale <= 1:
        return picture
    width, height = (round(side * scale) for side in picture.size)
    if width * height > MAX_PIXELS:
        raise ImageError(f"a picture of {by(picture.size)} is too long and thin to corrupt.")
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise _missing() from error


def _functions() -> Mapping[str, Callable[..., Any]]:
    try:
        from imagecorruptions import corruption_dict
    except ModuleNotFoundError as error:
        raise _missing() from error
    except ImportError as error:  # of a library of the system, which OpenCV wants
        reason = " ".join(str(error).split())
        raise DiveFastError(
            f"{PACKAGE} cannot be loaded ({reason}): on a machine without a display pip install "
            "opencv-python-headless in the place of opencv-python."
        ) from error
    return corruption_dict


def _missing() -> DiveFastError:
    return DiveFastError(
        f"corruptions come from {PACKAGE}, which is not installed: "
        "pip install 'dive_fast[corruptions]'."
    )
