"""Whether the image files of a data set are those that were annotated, by their headers."""

from __future__ import annotations

from dive_fast.data.coco.dataset import CocoDataset
from dive_fast.data.coco.headers import QUARTER_TURNS, read_header
from dive_fast.errors import DataError, ImageError


def mirrored_images(dataset: CocoDataset) -> str | None:
    """One sentence on images that EXIF turns and whose size does not show it; None without any.

    Opens every image that has a file, without decoding it.
    """
    found = []
    for image in dataset.images:
        header = None if image.path is None else read_header(image.path)
        if header is None or header.orientation == 1 or header.upright != tuple(image.size):
            continue
        # A quarter turn shows, but for squares.
        if header.orientation not in QUARTER_TURNS or header.size == header.upright:
            found.append((image, header))
    if not found:
        return None
    image, header = found[0]
    return (
        f"{dataset.source}: EXIF turns or mirrors {len(found):,} images, such as {image.path} "
        f"(orientation {header.orientation}), and their sizes do not show it; their boxes are "
        "taken to be of the upright images."
    )


def expect_fitting_images(dataset: CocoDataset) -> None:
    """That a search has images to work on, asked before it begins.

    Stops at the first image that may do; whether its pixels are whole, only decoding tells.

    Raises:
        DataError: every image that lies in its folder is no image, or has another size than
            annotated.
    """
    present = [image for image in dataset.images if image.path is not None]
    for image in present:
        header = read_header(image.path)
        if header is not None and header.upright == tuple(image.size):
            return
    if present:
        try:
            present[0].read()
        except ImageError as error:
            raise DataError(
                f"{dataset.source}: expected images of their annotated sizes, got none of "
                f"{len(present):,} ({str(error).rstrip('.')})."
            ) from error
