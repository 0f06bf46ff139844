"""Encoding ahead: pixels of several images go through the model's encoder at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch

from dive_fast.data.images import from_bytes
from dive_fast.engine.cache import is_out_of_memory
from dive_fast.errors import ImageError

log = logging.getLogger(__name__)

K = TypeVar("K")
Encode = Callable[[torch.Tensor], torch.Tensor]

# On a GPU one image leaves an encoder waiting for its kernels. A CPU gains nothing (docs/reading.md
# has the figures), and the first answer would wait for all of them.
GPU_BATCH, CPU_BATCH = 8, 1


def images_at_once(device: torch.device) -> int:
    """How many images are encoded together on a device."""
    return CPU_BATCH if device.type == "cpu" else GPU_BATCH


def encoded(
    pairs: Iterable[tuple[K, Any]], encode: Encode, at_once: int
) -> Iterator[tuple[K, Any]]:
    """x0 of every image, in their order.

    At most ``at_once`` images are held; halved for good when memory runs out.

    Args:
        pairs: a key and pixels, uint8 [channels, size, size], or an ``ImageError``, which is
            handed on in its place.
        encode: x0 [B, C, h, w] of float32 pixels [B, channels, size, size] in [-1, 1].
        at_once: images per call of ``encode``, at least 1.
    """
    pairs = iter(pairs)
    while held := list(islice(pairs, at_once)):
        pixels = [value for _, value in held if not isinstance(value, ImageError)]
        x0, at_once = _encoded(pixels, encode, at_once)
        for key, value in held:
            yield key, value if isinstance(value, ImageError) else next(x0)


def _encoded(
    pixels: list[torch.Tensor], encode: Encode, at_once: int
) -> tuple[Iterator[torch.Tensor], int]:
    """x0 of each, and how many images there is memory for."""
    found: list[torch.Tensor] = []
    while len(found) < len(pixels):
        some = pixels[len(found) : len(found) + at_once]
        try:
            found.extend(encode(from_bytes(torch.stack(some))))
        except (RuntimeError, MemoryError) as error:
            if len(some) == 1 or not is_out_of_memory(error):
                raise
            at_once = len(some) // 2
            log.warning(
                "out of memory with %d images to encode; going on with %d", len(some), at_once
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return iter(found), at_once
