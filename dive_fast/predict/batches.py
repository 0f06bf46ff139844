"""A classifier for pipelines that map a class over batches of columns, such as Ray Data's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dive_fast.data.image_files import decode_image
from dive_fast.data.images import as_image
from dive_fast.errors import DataError, DiveFastError, ImageError, shown
from dive_fast.predict.classifier import DiffusionClassifier

COLUMNS = ("label", "index", "probability", "evaluations", "error")
_OPTIONS = ("strategy", "preset", "probes", "seed", "timesteps", "weights", "prior", "head")


class RayClassifier:
    """Classifies a column of images: a callable class for ``ray.data.Dataset.map_batches``.

    The model is loaded once per worker. An image that cannot be read gets a row of its own kind,
    with the reason as its "error", and the rest go on.

    Args:
        model: what ``DiffusionClassifier.from_pretrained`` takes, or a classifier that is there.
        column: of the images: arrays [h, w] or [h, w, c], the bytes of image files, paths, or
            Hugging Face's ``{"bytes": ..., "path": ...}``.
        prefix: before the names of the new columns, where the data have such already.
        arguments: those of ``DiffusionClassifier.stream`` (``strategy``, ``preset``, ``probes``,
            ``seed``, ``timesteps``, ``weights``, ``prior``, ``head``), the rest those of
            ``from_pretrained``.

    Raises:
        ModelError: the model cannot be loaded.
        DiveFastError: an argument is none of its kind.

    Example:
        >>> ds = ray.data.read_images("photos/")
        >>> ds.map_batches(
        ...     RayClassifier, fn_constructor_kwargs={"model": "DIR"}, concurrency=4, batch_size=32)
    """

    def __init__(
        self,
        model: str | Path | DiffusionClassifier,
        *,
        column: str = "image",
        prefix: str = "",
        **arguments: Any,
    ) -> None:
        self._column, self._prefix = column, prefix
        self._asked = {k: arguments.pop(k) for k in _OPTIONS if k in arguments}
        if isinstance(model, DiffusionClassifier):
            if arguments:
                raise DiveFastError(
                    f"{', '.join(arguments)}: a classifier that is there is not loaded with it."
                )
            self._classifier = model
        else:
            self._classifier = DiffusionClassifier.from_pretrained(model, **arguments)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch and its answers.

        Args:
            batch: columns, of which one holds the images.

        Returns:
            All columns, and of each image ``label`` (text; "" where it cannot be read), ``index``
            (int64; -1), ``probability`` (float32; NaN), ``evaluations`` (int64; 0) and ``error``
            (text; "" where there is none).

        Raises:
            DataError: there is no such column, or one of the new columns is there already.
        """
        images = self._images(batch)
        found = [("", -1, math.nan, 0, "")] * len(images)

        def latents() -> Iterator[tuple[int, torch.Tensor]]:
            for row, image in enumerate(images):
                try:
                    yield row, self._classifier.encode([picture(image)])[0]
                except ImageError as error:
                    found[row] = ("", -1, math.nan, 0, str(error))

        # Strategies need gradients even where the caller has switched them off.
        with torch.inference_mode(False):
            for row, answer in self._classifier.stream(latents=latents(), **self._asked):
                cost = answer.evaluations
                found[row] = (answer.label, answer.index, answer.probability, cost, "")
        types = (object, np.int64, np.float32, np.int64, object)
        columns = list(zip(*found, strict=True)) or [()] * len(COLUMNS)
        new = {
            self._prefix + name: np.array(values, dtype=kind)
            for name, values, kind in zip(COLUMNS, columns, types, strict=True)
        }
        return {**batch, **new}

    def _images(self, batch: Mapping[str, Any]) -> Any:
        if self._column not in batch:
            raise DataError(
                f"expected a column {self._column!r} of images, got {', '.join(map(str, batch))}."
            )
        if taken := [self._prefix + name for name in COLUMNS if self._prefix + name in batch]:
            raise DataError(
                f"the data have a column {taken[0]!r} already: give a prefix for the new ones."
            )
        return batch[self._column]


def picture(value: Any) -> Image.Image:
    """An image of a column, whatever form it has there.

    Raises:
        ImageError: it is none, or cannot be read.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_image(bytes(value), "the image")
    if not isinstance(value, Image.Image | np.ndarray | torch.Tensor | str | os.PathLike):
        raise ImageError(f"expected an image as array, bytes or path, got {shown(value)}.")
    return as_image(value)
