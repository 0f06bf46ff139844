"""The pictures of annotated images, one by one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from PIL import Image

from dive_fast.data.coco.dataset import CocoImage
from dive_fast.data.coco.ids import Id
from dive_fast.data.images import to_mode
from dive_fast.errors import ImageError

log = logging.getLogger(__name__)


def readable(images: Iterable[CocoImage]) -> Iterator[tuple[Id, Image.Image]]:
    """Ids and pictures in RGB; what cannot be read is left out with a warning."""
    for image in images:
        try:
            yield image.id, to_mode(image.read(), 3)
        except ImageError as error:
            log.warning(error)
