"""From whatever holds an image to the network's input: float32 [channels, size, size] in [-1, 1].

Every input first becomes an 8-bit image (``as_image``), so the same image gives the identical
tensor whether it comes as a file, a PIL image, an array or a tensor. Input that is in model space
already goes to the classifier as ``latents=`` and never comes here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile

from dive_fast.data.formats import FORMATS
from dive_fast.data.image_files import MAX_PIXELS, by, decoded, read_image
from dive_fast.errors import ImageError

T = TypeVar("T")

_ARRAY_CHANNELS = (1, 3, 4)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert any PIL mode to ``"L"`` (1 channel) or ``"RGB"`` (3 channels), 8 bits each.

    Transparency (alpha, or a transparent colour) is laid on white. Modes ``I`` and ``I;16`` hold
    16-bit values and are divided by 257; mode ``F`` holds [0, 1].

    Raises:
        ImageError: ``channels`` is neither 1 nor 3, the values of an ``I`` or ``F`` image leave
            their range, Pillow cannot convert the mode, or the image is a file not decoded yet
            of a format that is not read.
    """
    _check_opened(image)
    if channels not in (1, 3):
        raise ImageError(
            f"images can be made for models of 1 or 3 channels, got {channels}: "
            "give the input in model space as latents=."
        )
    if min(image.size) < 1:
        raise ImageError(f"expected an image of at least 1 pixel, got {by(image.size)}.")
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8bit(_deep_values(image)))
    try:
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        if channels == 1 and image.mode in ("1", "L"):
            return image.convert("L")
        # Through RGB: Pillow has no direct way to grey from every mode.
        return image.convert("RGB").convert("L" if channels == 1 else "RGB")
    except ValueError as error:
        raise ImageError(f"an image of mode {image.mode} cannot be used ({error}).") from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` and cut out the central square.

    The crop of ADM (arXiv 2105.05233), as the DiT and DIVE scripts use it: halve with a box
    filter while the shorter side is at least twice ``size``, then one bicubic resize. An image
    of ``size`` x ``size`` passes unchanged. Convert with ``to_mode`` first: Pillow does not
    interpolate palette images.

    Raises:
        ImageError: ``size`` or a side of the image is below 1, or the image is so long and
            thin that the resized one would exceed ``MAX_PIXELS``.
    """
    _check_sides(image, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"an image of {by(image.size)} is too long and thin: with its shorter side resized "
            f"to {size} it would exceed {MAX_PIXELS:,} pixels."
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_box(picture: tuple[int, int], size: int) -> tuple[float, float, float, float]:
    """What ``center_crop`` keeps of a picture: (left, top, right, bottom) in its own pixels.

    Args:
        picture: (w, h) of it, at least 1 each.
        size: side of the crop.
    """
    width, height = picture
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    x, y = picture[0] / width, picture[1] / height
    return left * x, top * y, (left + size) * x, (top + size) * y


def squash(image: Image.Image, size: int) -> Image.Image:
    """Resize to ``size`` x ``size`` whatever the proportions, so that no object is cut off.

    Boxes in the unit interval stay where they are. Bicubic, widened where it shrinks, as Pillow
    does. Convert with ``to_mode`` first: Pillow does not interpolate palette images.

    Raises:
        ImageError: ``size`` or a side of the image is below 1.
    """
    _check_sides(image, size)
    return image.resize((size, size), Image.Resampling.BICUBIC)


def image_to_tensor(image: Image.Image, size: int, channels: int) -> torch.Tensor:
    """One image as float32 [channels, size, size] in [-1, 1]: value / 127.5 - 1."""
    return _to_tensor(center_crop(to_mode(image, channels), size), channels)


def image_bytes(image: object, size: int, channels: int) -> torch.Tensor:
    """One image as ``as_image`` takes it, cropped and resized: uint8 [channels, size, size].

    ``from_bytes`` makes of it what ``as_images`` gives.

    Raises:
        ImageError: as for ``as_images``.
    """
    return _to_bytes(center_crop(to_mode(as_image(image), channels), size), channels)


def from_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape as float32 in [-1, 1]: value / 127.5 - 1."""
    return pixels.float() / 127.5 - 1.0


def as_image(image: object) -> Image.Image:
    """One image in any accepted form as a decoded PIL image.

    Accepted: a PIL image; a path; a numpy array [h, w] or [h, w, c]; a torch tensor [h, w] or
    [c, h, w]; with c of 1, 3 or 4 (alpha). Arrays and tensors are uint8, uint16 (divided by 257),
    or floating point in [0, 1] (rounded to 8 bits).

    Raises:
        ImageError: anything else, NaN or infinity, or values outside the range.
    """
    if isinstance(image, Image.Image):
        _check_opened(image)
        return decoded(image, f"the PIL image of {by(image.size)}")
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, torch.Tensor):
        return _array_to_image(_channels_last(image))
    if isinstance(image, np.ndarray):
        return _array_to_image(image)
    raise ImageError(
        "expected an image as PIL image, path, numpy array or torch tensor, "
        f"got {type(image).__name__}."
    )


def as_images(images: object, size: int, channels: int) -> list[torch.Tensor]:
    """One or many images as a list of float32 [channels, size, size] in [-1, 1].

    Args:
        images: one image as ``as_image`` takes it, a list or tuple of such, or a batch:
            a numpy array [n, h, w] or [n, h, w, c], or a torch tensor [n, c, h, w]. An array of
            three dimensions is one image [h, w, c] if its last dimension is 1, 3 or 4, and
            a batch [n, h, w] otherwise.
        size: side of the model's input in pixels.
        channels: 1 or 3.

    Raises:
        ImageError: there is no image, or one of them cannot be used; with several images the
            message begins with the number of the bad one, counted from 0.
    """
    return _each(images, channels, lambda image: image_to_tensor(image, size, channels))


def as_whole_images(images: object, channels: int) -> list[Image.Image]:
    """The images that ``as_images`` takes, whole, as grey or RGB PIL images.

    Raises:
        ImageError: as for ``as_images``.
    """
    return _each(images, channels, lambda image: to_mode(image, channels))


def squashed_tensor(image: Image.Image, size: int, channels: int) -> torch.Tensor:
    """One image ``squash``ed, as float32 [channels, size, size] in [-1, 1]."""
    return _to_tensor(squash(to_mode(image, channels), size), channels)


def _check_sides(image: Image.Image, size: int) -> None:
    if size < 1 or min(image.size) < 1:
        raise ImageError(
            f"expected an image and a size of at least 1 pixel, got an image of "
            f"{by(image.size)} and size {size}."
        )


def _check_opened(image: Image.Image) -> None:
    """A file that somebody opened is decoded only now: not in a format that ``read_image`` refuses.

    Pixels that are there already may come from anywhere.
    """
    decoded = any(image.__dict__.get(slot) is not None for slot in ("_im", "im"))
    if isinstance(image, ImageFile.ImageFile) and not decoded and image.format not in FORMATS:
        raise ImageError(
            f"the PIL image of {by(image.size)}: expected one of the formats "
            f"{', '.join(FORMATS)}, got {image.format} that is not decoded yet; decode it yourself "
            "(image.load()), or convert it to JPEG or PNG."
        )


def _each(images: object, channels: int, make: Callable[[Image.Image], T]) -> list[T]:
    """What ``make`` makes of every image; errors tell the number of the bad one of several."""
    images = single_images(images, channels)
    found = []
    for index, image in enumerate(images):
        try:
            found.append(make(as_image(image)))
        except ImageError as error:
            if len(images) == 1:
                raise
            raise ImageError(f"image {index}: {error}") from error
    return found


def _to_tensor(image: Image.Image, channels: int) -> torch.Tensor:
    """A square image of the right mode as float32 [channels, size, size] in [-1, 1]."""
    return from_bytes(_to_bytes(image, channels))


def _to_bytes(image: Image.Image, channels: int) -> torch.Tensor:
    """A square image of the right mode as uint8 [channels, size, size]."""
    pixels = np.array(image, dtype=np.uint8)
    pixels = pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def single_images(images: object, channels: int) -> list[object]:
    """What ``as_images`` takes, as a list of single images for ``as_image``, not looked at yet.

    Raises:
        ImageError: there is none, or it cannot be told what they are.
    """
    found = _split(images, channels)
    if not found:
        raise ImageError("expected at least one image, got none.")
    return found


def _split(images: object, channels: int) -> list[object]:
    """One or many, as a list of single images."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, torch.Tensor):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, np.ndarray):
        return [images]
    if images.ndim == 3 and images.shape[-1] not in _ARRAY_CHANNELS:
        if channels == 3 and images.shape[0] == 3:
            raise ImageError(
                f"an array of shape {images.shape} could be one channel-first image or three "
                "grey ones: expected [h, w, c] or [n, h, w, c], or a channel-first torch tensor."
            )
        return list(images)
    return list(images) if images.ndim == 4 else [images]


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    """[h, w] or [c, h, w] to [h, w] or [h, w, c] in numpy."""
    if tensor.ndim == 3 and tensor.shape[0] not in _ARRAY_CHANNELS or tensor.ndim not in (2, 3):
        raise ImageError(
            "expected a tensor [c, h, w] or [n, c, h, w] with c of 1, 3 or 4, "
            f"got shape {tuple(tensor.shape)}."
        )
    try:
        tensor = tensor.detach().cpu()
        array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except (RuntimeError, TypeError) as error:
        raise ImageError(
            f"expected a dense tensor with values, got dtype {tensor.dtype}, layout "
            f"{tensor.layout} on {tensor.device}."
        ) from error
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def _array_to_image(array: np.ndarray) -> Image.Image:
    """[h, w] or [h, w, c] to an image of mode L, RGB or RGBA."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in _ARRAY_CHANNELS):
        raise ImageError(
            "expected one image [h, w] or [h, w, c] with c of 1, 3 or 4, or an array [n, h, w] "
            f"or [n, h, w, c] of several, got shape {array.shape}."
        )
    if array.size == 0:
        raise ImageError(f"expected an image of at least 1 pixel, got shape {array.shape}.")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(_to_8bit(array)))


def _to_8bit(array: np.ndarray) -> np.ndarray:
    """uint8, uint16 or floats in [0, 1] to uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return np.rint(array / 257.0).astype(np.uint8)
    if array.dtype.kind != "f":
        raise ImageError(
            f"expected pixels as uint8, uint16 or floating point in [0, 1], got {array.dtype}."
        )
    if not np.isfinite(array).all():
        raise ImageError("expected finite pixels, got NaN or infinity.")
    levels = np.rint(array.astype(np.float64) * 255.0)  # a resize's slight overshoot rounds away
    if levels.min() < 0 or levels.max() > 255:
        raise ImageError(
            f"expected floating-point pixels in [0, 1], got {array.min():.4g} to "
            f"{array.max():.4g}: scale them, or give model-space input as latents=."
        )
    return levels.astype(np.uint8)


def _deep_values(image: Image.Image) -> np.ndarray:
    """The values of a mode I, I;16 or F image, as uint16 or float32 [h, w]."""
    values = np.asarray(image)
    if values.dtype != np.int32:
        return values
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"expected 16-bit values 0 to 65535 in an image of mode {image.mode}, got "
            f"{values.min()} to {values.max()}."
        )
    return values.astype(np.uint16)
