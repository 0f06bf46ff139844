"""What a detector answers for one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from dive_fast.data.images import as_image
from dive_fast.errors import DiveFastError
from dive_fast.predict.drawing import draw_boxes

if TYPE_CHECKING:
    import supervision

# From here on a class gets a COCO entry of its own. With probabilities that can be believed, what
# is left out cannot change the scores to three digits: it adds less than 0.001 C to the recall, at
# a precision of at most 1 / C, because each box would count in C classes and be right in one.
LEAST_PROBABILITY = 0.001

# Sums of many float32 probabilities are a little off.
_ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one image, possibly none.

    Lists, arrays and tensors are taken; they are kept as tensors on the CPU.

    Attributes:
        xyxy: float32 [n, 4], left, top, right and bottom of each box in pixels of the image, edges
            and not pixel centres: a box of the whole image is (0, 0, width, height).
        class_id: int64 [n], rows of ``names``.
        confidence: float32 [n], in [0, 1].
        names: the classes' names.
        class_probabilities: float32 [n, C], p(c | rest, x0) of each object for all C classes of
            ``names``, where they are known. A row sums to at most 1; the rest is "not there".
        evaluations: forwards plus backwards of the network that this image took.
        seconds: this image's share of the time, the packing of many images taken into account.
        trace: what the strategy saw, if asked for.
        reason: why nothing was found, where that is so and the search says it.

    Raises:
        DiveFastError: shapes that do not agree, a box without area, a class that has no name, a
            confidence or a probability outside [0, 1], or probabilities that sum to more than 1.
    """

    xyxy: torch.Tensor
    class_id: torch.Tensor
    confidence: torch.Tensor
    names: tuple[str, ...]
    class_probabilities: torch.Tensor | None = None
    evaluations: int = 0
    seconds: float = 0.0
    trace: dict[str, Any] | None = field(default=None, repr=False)
    reason: str | None = None

    def __post_init__(self) -> None:
        xyxy = _tensor("xyxy", self.xyxy, torch.float32)
        # An empty list has no second dimension.
        xyxy = xyxy.reshape(0, 4) if xyxy.shape == (0,) else xyxy
        values = {
            "xyxy": xyxy,
            "class_id": _tensor("class_id", self.class_id, torch.int64),
            "confidence": _tensor("confidence", self.confidence, torch.float32),
            "names": tuple(self.names),
        }
        if self.class_probabilities is not None:
            rows = _tensor("class_probabilities", self.class_probabilities, torch.float32)
            rows = rows.reshape(0, len(values["names"])) if rows.shape == (0,) else rows
            values["class_probabilities"] = rows
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if self.xyxy.ndim != 2 or self.xyxy.shape[1] != 4:
            raise DiveFastError(f"xyxy must have shape [n, 4], got {list(self.xyxy.shape)}.")
        n = len(self.xyxy)
        for name in ("class_id", "confidence"):
            shape = list(getattr(self, name).shape)
            if shape != [n]:
                raise DiveFastError(f"{name} must have shape [{n}], one per box, got {shape}.")
        bad = ~(self.xyxy.isfinite().all(1) & (self.xyxy[:, 2:] > self.xyxy[:, :2]).all(1))
        if bad.any():
            raise DiveFastError(
                "xyxy must hold finite boxes with left < right and top < bottom, got "
                f"{self.xyxy[bad][0].tolist()}."
            )
        bad = (self.class_id < 0) | (self.class_id >= len(self.names))
        if bad.any():
            raise DiveFastError(
                f"class_id must lie in [0, {len(self.names)}), the classes with a name, got "
                f"{self.class_id[bad][0].item()}."
            )
        bad = ~((self.confidence >= 0) & (self.confidence <= 1))  # NaN is bad, too
        if bad.any():
            raise DiveFastError(
                f"confidence must lie in [0, 1], got {self.confidence[bad][0].item():.4g}."
            )
        if self.class_probabilities is not None:
            self._check_probabilities(self.class_probabilities)

    def _check_probabilities(self, rows: torch.Tensor) -> None:
        expected, shape = [len(self.xyxy), len(self.names)], list(rows.shape)
        if shape != expected:
            raise DiveFastError(
                f"class_probabilities must have shape {expected}, one per box and name, got "
                f"{shape}."
            )
        bad = ~((rows >= 0) & (rows <= 1))  # NaN is bad, too
        if bad.any():
            raise DiveFastError(
                f"class_probabilities must lie in [0, 1], got {rows[bad][0].item():.4g}."
            )
        sums = rows.sum(dim=1)
        bad = sums > 1 + _ROUNDING
        if bad.any():
            raise DiveFastError(
                "class_probabilities must sum to at most 1 for each box, got "
                f"{sums[bad][0].item():.4g}."
            )

    def __len__(self) -> int:
        return len(self.xyxy)

    @property
    def labels(self) -> list[str]:
        """The name of each object's class."""
        return [self.names[c] for c in self.class_id.tolist()]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON, as docs/records.md lists them.

        ``boxes`` (xyxy), ``labels``, ``indices`` and ``confidences``, one for each object;
        ``class_probabilities``, a list of C for each, where they are known; ``evaluations`` and
        ``seconds``; ``reason`` where there is one.
        """
        found: dict[str, Any] = {
            "boxes": self.xyxy.tolist(),
            "labels": self.labels,
            "indices": self.class_id.tolist(),
            "confidences": self.confidence.tolist(),
        }
        if self.class_probabilities is not None:
            found["class_probabilities"] = self.class_probabilities.tolist()
        if self.reason is not None:
            found["reason"] = self.reason
        return {**found, "evaluations": self.evaluations, "seconds": self.seconds}

    def to_coco(
        self,
        image_id: int | str,
        category_ids: Sequence[int | str | None],
        *,
        every_class: bool = False,
    ) -> list[dict[str, Any]]:
        """COCO results: ``[{"image_id", "category_id", "bbox", "score"}, ...]``.

        Args:
            image_id: the image's id in the annotation file.
            category_ids: the COCO category of each class of ``names``; None for a class that the
                annotation file does not have, whose entries are left out.
            every_class: one entry for each object and each class whose probability is at least
                0.001, which is its score; the object's own class always has one. Objects whose
                probabilities are not known count with their class only.

        Returns:
            One entry per object, by its class and confidence, unless ``every_class``; ``bbox`` as
            [left, top, width, height] in pixels.

        Raises:
            DiveFastError: there is not one category per name.
        """
        if len(category_ids) != len(self.names):
            raise DiveFastError(
                f"expected a category for each of the {len(self.names)} names, got "
                f"{len(category_ids)}."
            )
        # In double precision: left + width is the right edge again.
        corners = self.xyxy.double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        entries = zip(boxes, self._scores(every_class), strict=True)
        return [
            {"image_id": image_id, "category_id": category_ids[c], "bbox": list(box), "score": p}
            for box, scores in entries
            for c, p in scores
            if category_ids[c] is not None
        ]

    def _scores(self, every_class: bool) -> list[list[tuple[int, float]]]:
        """The classes that each object counts with, and their scores."""
        own = self.class_id.tolist()
        if not every_class or self.class_probabilities is None:
            return [[(c, p)] for c, p in zip(own, self.confidence.tolist(), strict=True)]
        return [
            [(c, p) for c, p in enumerate(row) if p >= LEAST_PROBABILITY or c == mine]
            for mine, row in zip(own, self.class_probabilities.tolist(), strict=True)
        ]

    def to_supervision(self) -> supervision.Detections:
        """The same as ``supervision.Detections``, with the labels as its ``class_name``.

        Raises:
            DiveFastError: supervision is not installed.
        """
        import numpy as np

        try:
            from supervision import Detections as SupervisionDetections
        except ImportError as error:
            raise DiveFastError(
                "to_supervision() needs supervision, which is not installed: "
                "pip install supervision."
            ) from error
        return SupervisionDetections(
            xyxy=self.xyxy.numpy().copy(),
            class_id=self.class_id.numpy().copy(),
            confidence=self.confidence.numpy().copy(),
            data={"class_name": np.array(self.labels, dtype=str)},
        )

    def draw(self, image: object) -> Image.Image:
        """The image with its boxes, labels and confidences drawn on it.

        Small images are enlarged by a whole factor, pixel by pixel, so that labels can be read
        beside the objects; others keep their size.

        Args:
            image: the image that was searched, in any form that the detector takes.

        Returns:
            A new RGB image.

        Raises:
            ImageError: the image cannot be read.
        """
        captions = [
            f"{label} {score:.2f}"
            for label, score in zip(self.labels, self.confidence.tolist(), strict=True)
        ]
        return draw_boxes(as_image(image), self.xyxy.tolist(), self.class_id.tolist(), captions)


def _tensor(name: str, values: object, dtype: torch.dtype) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DiveFastError(f"{name} must hold numbers ({error}).") from error
    if dtype == torch.int64 and tensor.is_floating_point() and tensor.numel():
        raise DiveFastError(f"{name} must hold whole numbers, got {tensor.dtype}.")
    return tensor.to(dtype)
