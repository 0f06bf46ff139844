"""The pictures of a data set as one array."""

from __future__ import annotations

import numpy as np

from dive_fast.data.coco.dataset import CocoDataset
from dive_fast.data.images import squash, to_mode


def read_pictures(dataset: CocoDataset, size: int, channels: int = 3) -> np.ndarray:
    """All pictures squashed to one square size, for training.

    Returns:
        uint8 [n, channels, size, size], in the order of ``dataset.images``. Boxes in the unit
        interval (``CocoImage.layout``) fit them.

    Raises:
        ImageError: a picture cannot be read.
    """
    pictures = np.empty((len(dataset.images), size, size, channels), dtype=np.uint8)
    for picture, image in zip(pictures, dataset.images, strict=True):
        square = squash(to_mode(image.read(), channels), size)
        picture[...] = np.asarray(square).reshape(size, size, channels)
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
