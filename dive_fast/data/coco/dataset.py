"""Images with labelled boxes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dive_fast.core.layouts import Layout
from dive_fast.data.coco.headers import misfit
from dive_fast.data.coco.ids import Id
from dive_fast.data.coco.problems import Problem, tell_all
from dive_fast.data.images import read_image, squash, to_mode
from dive_fast.errors import DataError, ImageError

HELD_OUT_SHARE, HELD_OUT_SEED = 0.1, 0


@dataclass(frozen=True, eq=False)
class CocoImage:
    """One image with its annotated boxes.

    Attributes:
        id: its COCO id, a whole number or a text.
        path: where the image lies; None where there is no such file, or none was asked for.
        size: (width, height) in pixels.
        boxes: float32 [n, 4], xyxy in pixels, cut at the image's border.
        class_ids: int64 [n], rows of the data set's ``names``.
        crowd: bool [n], boxes around a group that was not annotated one by one.
        bbox: float64 [n, 4], left, top, width and height exactly as annotated, which is what the
            COCO numbers are computed from. By default taken from ``boxes``.
        area: float64 [n], in square pixels, which decides what is small, medium and large; of the
            object's mask where the file has one. By default that of the box.
    """

    id: Id
    path: Path | None
    size: tuple[int, int]
    boxes: torch.Tensor
    class_ids: torch.Tensor
    crowd: torch.Tensor
    bbox: torch.Tensor | None = None
    area: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.bbox is None:
            corners = self.boxes.double()
            bbox = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
            object.__setattr__(self, "bbox", bbox)
        if self.area is None:
            object.__setattr__(self, "area", self.bbox[:, 2] * self.bbox[:, 3])
        n = len(self.boxes)
        shapes = {"boxes": [n, 4], "class_ids": [n], "crowd": [n], "bbox": [n, 4], "area": [n]}
        for name, shape in shapes.items():
            if list(getattr(self, name).shape) != shape:
                raise DataError(
                    f"{name} of image {self.id} must have shape {shape}, got "
                    f"{list(getattr(self, name).shape)}."
                )

    def read(self) -> Image.Image:
        """The image, decoded.

        Raises:
            ImageError: it is missing, cannot be read, or has another size than the annotations
                say, so that their boxes would lie elsewhere; also where they are of the image as
                it is stored and EXIF turns it by 90 degrees.
        """
        if self.path is None:
            raise ImageError(f"image {self.id} has no file.")
        image = read_image(self.path)
        if image.size != tuple(self.size):
            raise ImageError(misfit(self.path, self.size, image.size))
        return image

    def pixels(self, size: int, channels: int = 3) -> np.ndarray:
        """The image squashed to a square, uint8 [channels, size, size].

        Boxes in the unit interval (``layout``) fit it.

        Raises:
            ImageError: as for ``read``.
        """
        square = np.asarray(squash(to_mode(self.read(), channels), size))
        return square.reshape(size, size, channels).transpose(2, 0, 1)

    def layout(self) -> Layout:
        """The objects in the unit interval, without crowds."""
        single = ~self.crowd
        scale = torch.tensor([*self.size, *self.size], dtype=torch.float32)
        boxes = (self.boxes[single] / scale).clamp(0, 1)
        return Layout(boxes=boxes, class_ids=self.class_ids[single])


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """Images with labelled boxes.

    Attributes:
        names: the classes' names.
        category_ids: their COCO ids, whole numbers or texts.
        images: in the file's order.
        source: the name of the annotation file, or of what made the images.
        notes: what was left out or changed when the annotations were read.
        where: what was read, paths made absolute: ``annotations``, and ``images`` where a folder
            was given; None for data of another origin. It is no part of the identity.
    """

    names: tuple[str, ...]
    category_ids: tuple[Id, ...]
    images: tuple[CocoImage, ...]
    source: str
    notes: tuple[Problem, ...] = ()
    where: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if len(self.names) != len(self.category_ids):
            raise DataError(
                f"expected a category id for each of the {len(self.names)} names, got "
                f"{len(self.category_ids)}."
            )
        for what, values in (
            ("category id", self.category_ids),
            ("category name", self.names),
            ("image id", [image.id for image in self.images]),
        ):
            value, count = (Counter(values).most_common(1) or [(None, 0)])[0]
            if count > 1:
                raise DataError(f"{self.source}: the {what} {value!r} occurs {count} times.")
        value, count = (Counter(str(i.id) for i in self.images).most_common(1) or [(None, 0)])[0]
        if count > 1:  # a run's records hold ids as text
            raise DataError(
                f"{self.source}: expected ids that differ as text, got images {value} and "
                f"{value!r}."
            )
        for image in self.images:
            ids = image.class_ids
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.names):
                raise DataError(
                    f"{self.source}: expected classes 0 to {len(self.names) - 1} in image "
                    f"{image.id}, got {int(ids.min())} to {int(ids.max())}."
                )

    @property
    def problems(self) -> tuple[str, ...]:
        """What was left out or changed when the annotations were read, one sentence each."""
        return tuple(note.sentence for note in self.notes)

    def tell_problems(self, tell: Callable[[str], object]) -> None:
        """Gives ``tell`` the problems as sentences, like ones counted together, six at most."""
        tell_all(self.notes, self.source, tell)

    def expect_objects(self, purpose: str) -> None:
        """Objects to score or to learn from, in images that lie in their folder where some do.

        Args:
            purpose: such as "to learn from".

        Raises:
            DataError: there are none; boxes around crowds are none.
        """
        present = [image for image in self.images if image.path is not None] or self.images
        if not any((~image.crowd).any() for image in present):
            raise DataError(
                f"{self.source}: expected annotated objects {purpose}, got none in "
                f"{len(present)} images."
            )

    def select(self, limit: int | None, seed: int = 0) -> CocoDataset:
        """A random subset of ``limit`` images in their original order; None, or more, means all.

        With one seed, a smaller subset is part of every larger one.

        Raises:
            DataError: ``limit`` is below 1 or ``seed`` below 0.
        """
        if limit is not None and limit < 1:
            raise DataError(f"expected a limit of at least 1 image, got {limit}.")
        if seed < 0:
            raise DataError(f"expected a seed of at least 0, got {seed}.")
        if limit is None or limit >= len(self.images):
            return self
        chosen = np.random.default_rng(seed).permutation(len(self.images))[:limit]
        return self.take(sorted(chosen.tolist()))

    def take(self, positions: Iterable[int]) -> CocoDataset:
        """The images at these positions, in that order."""
        return replace(self, images=tuple(self.images[i] for i in positions))

    def identity(self) -> dict[str, str | int]:
        """What tells this data set from another, for JSON: source, count, fingerprint.

        The fingerprint covers the annotations and the sizes of the image files, not where they
        lie, so a run resumes after the data were moved.
        """
        content = json.dumps([self.to_coco(), [_file_size(image.path) for image in self.images]])
        return {
            "source": self.source,
            "count": len(self.images),
            "fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
        }

    def to_coco(self, folder: Path | None = None) -> dict[str, Any]:
        """The data set in COCO's own form, for JSON; annotations are numbered from 1.

        Args:
            folder: file names are written relative to it; by default they are bare names.
        """
        annotations = []
        for image in self.images:
            rows = zip(
                image.class_ids.tolist(),
                image.bbox.tolist(),
                image.area.tolist(),
                image.crowd.tolist(),
                strict=True,
            )
            for class_id, bbox, area, crowd in rows:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image.id,
                        "category_id": self.category_ids[class_id],
                        "bbox": bbox,
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        names = zip(self.category_ids, self.names, strict=True)
        return {
            "info": {"description": self.source},
            "images": [_image_entry(image, folder) for image in self.images],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in names],
        }


def held_out_split(
    n: int, source: str, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random tenth of n layouts to hold out, always the same, and the rest to learn from.

    Args:
        source: what they are of, for the message.
        most: to hold out; no limit if None.

    Returns:
        int64 positions: to train on, and held out.

    Raises:
        DataError: fewer than two.
    """
    if n < 2:
        raise DataError(f"{source}: expected at least 2 images to learn from, got {n}.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    n_held_out = max(1, round(HELD_OUT_SHARE * n))
    n_held_out = n_held_out if most is None else min(most, n_held_out)
    return order[n_held_out:], order[:n_held_out]


def read_images(dataset: CocoDataset, size: int, channels: int = 3) -> np.ndarray:
    """All images squashed to one square size, for training.

    Returns:
        uint8 [n, channels, size, size], in the order of ``dataset.images``.

    Raises:
        ImageError: an image cannot be read.
    """
    images = np.empty((len(dataset.images), channels, size, size), dtype=np.uint8)
    for pixels, image in zip(images, dataset.images, strict=True):
        pixels[...] = image.pixels(size, channels)
    return images


def _image_entry(image: CocoImage, folder: Path | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": image.id, "width": image.size[0], "height": image.size[1]}
    if image.path is not None:
        name = image.path.name if folder is None else os.path.relpath(image.path, folder)
        entry["file_name"] = Path(name).as_posix()
    return entry


def _file_size(path: Path | None) -> int | None:
    try:
        return None if path is None else path.stat().st_size
    except OSError:
        return None
