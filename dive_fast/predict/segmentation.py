"""What ``segment`` answers: the posterior of the classes at every place of a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dive_fast.core.numbers import whole
from dive_fast.data.images import as_image, to_mode
from dive_fast.errors import DiveFastError, shown
from dive_fast.predict.drawing import class_colour
from dive_fast.predict.overlay import LONG_SIDE

BACKGROUND = "background"
MOST_PIXELS = 8192  # of a side
_OPACITY = 0.65
_PALETTE = 256  # colours of an image with a palette
_ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Which class each place of a picture shows.

    Attributes:
        posterior: float32 [C, h, w], p(c | place), summing to 1 over the classes.
        names: of the C classes.
        background: the row that means none of the others; None where there is none.
        evaluations: forwards plus backwards of the network that this image took.
        seconds: this image's share of the time.
        picture: as the model saw it; None where latents were given.

    Raises:
        DiveFastError: a posterior that is none, or not one name for each class.
    """

    posterior: torch.Tensor
    names: tuple[str, ...]
    background: int | None = None
    evaluations: int = 0
    seconds: float = 0.0
    picture: Image.Image | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        p = self.posterior
        if not isinstance(p, torch.Tensor) or p.ndim != 3 or not p.is_floating_point():
            raise DiveFastError(f"posterior must be floats [C, h, w], got {shown(p)}.")
        if len(self.names) != len(p) or min(p.shape) < 1:
            raise DiveFastError(
                f"expected a name for each class of {list(p.shape)}, got {len(self.names)}."
            )
        if not bool((p >= 0).all()) or not bool(((p.sum(dim=0) - 1).abs() < _ROUNDING).all()):
            raise DiveFastError("posterior must be at least 0 and sum to 1 over the classes.")
        if self.background is not None:
            whole("background", self.background, 0, len(p) - 1)
        object.__setattr__(self, "posterior", p.detach().float().cpu())
        object.__setattr__(self, "names", tuple(self.names))

    @property
    def labels(self) -> torch.Tensor:
        """int64 [h, w], the most probable class of each place, a row of ``names``."""
        return self.posterior.argmax(dim=0)

    @property
    def areas(self) -> dict[str, float]:
        """The share of the places that each class has; of equal names the sum."""
        labels = self.labels
        counts = torch.bincount(labels.flatten(), minlength=len(self.names)).tolist()
        found = dict.fromkeys(self.names, 0.0)
        for name, count in zip(self.names, counts, strict=True):
            found[name] += count / labels.numel()
        return found

    def resized(self, width: int, height: int) -> Segmentation:
        """The posterior interpolated bilinearly to so many pixels; the picture with it.

        Raises:
            DiveFastError: no whole numbers from 1 to 8192.
        """
        size = [whole(n, x, 1, MOST_PIXELS) for n, x in (("height", height), ("width", width))]
        picture = self.picture
        if picture is not None and picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        return Segmentation(
            enlarged(self.posterior, size),
            self.names,
            self.background,
            self.evaluations,
            self.seconds,
            picture,
        )

    def label_image(self) -> Image.Image:
        """The labels as an image of mode "P" with a palette; of more than 256 classes "I;16"."""
        labels = self.labels.numpy()
        if len(self.names) > _PALETTE:
            return Image.fromarray(labels.astype(np.uint16))
        image = Image.fromarray(labels.astype(np.uint8), mode="P")
        image.putpalette([part for row in range(len(self.names)) for part in self._colour(row)])
        return image

    def draw(self, picture: Any = None, *, size: int = LONG_SIDE) -> Image.Image:
        """The picture in pale grey under the classes' colours; the background stays grey.

        Args:
            picture: to draw on, in any form that the model takes, squashed to the map's
                proportions; as the model saw it if None, or plain white where latents were given.
            size: a smaller picture is enlarged to at least so many pixels, by a whole factor.

        Returns:
            An RGB image.

        Raises:
            DiveFastError: bad input.
        """
        size = whole("size", size, 1, MOST_PIXELS)
        labels = self.labels.numpy()
        sides = labels.shape[::-1]
        picture = self.picture if picture is None else to_mode(as_image(picture), 3)
        if picture is None:
            picture = Image.new("L", sides, 255)
        if picture.size != sides:
            picture = picture.resize(sides, Image.Resampling.BICUBIC)
        factor = max(1, math.ceil(size / max(sides)))
        pale = 64 + np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 2
        colours = np.array([self._colour(row) for row in range(len(self.names))], dtype=np.float64)
        seen = np.full(labels.shape, _OPACITY)
        if self.background is not None:
            seen[labels == self.background] = 0.0
        mixed = (1 - seen[..., None]) * pale + seen[..., None] * colours[labels]
        drawn = Image.fromarray(mixed.round().astype(np.uint8))
        return drawn.resize([factor * side for side in sides], Image.Resampling.NEAREST)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``classes``, ``size`` [width, height], ``areas``, what it cost."""
        return {
            "classes": list(self.names),
            "size": list(self.labels.shape[::-1]),
            "areas": self.areas,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }

    def _colour(self, row: int) -> tuple[int, int, int]:
        return (0, 0, 0) if row == self.background else class_colour(row)


def enlarged(posterior: torch.Tensor, size: list[int]) -> torch.Tensor:
    """A posterior [C, h, w] at (height, width) pixels, bilinearly: it still sums to 1."""
    if list(posterior.shape[1:]) == list(size):
        return posterior
    found = F.interpolate(posterior[None].float(), size, mode="bilinear", align_corners=False)[0]
    return found.clamp_min(0)
