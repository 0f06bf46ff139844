"""Where the answer explains a picture better than the next class does.

    d(i, j) = L_b(i, j) - L_a(i, j)

L_y(i, j) is the loss of class y at place (i, j) before its mean over the places, the mean over the
first probes; so the mean of d is what b's loss on these probes exceeds that of the answer a by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from dive_fast.app.watch import Stopped, Watch
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, ErrorMaps, Search
from dive_fast.errors import DiveFastError
from dive_fast.predict.classification import Classification
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.strategies import DefaultProbes, Task

MOST_PROBES = 32
RED, BLUE = (220, 38, 38), (37, 99, 235)
_SMOOTHED = 1 / 16  # of a map's side: standard deviation of the Gaussian
_STRONGEST = 0.85  # opacity of the largest difference
_LONG_SIDE = 384  # pixels that a smaller picture is enlarged to


@dataclass(frozen=True)
class Where:
    """A map, and what it took.

    Attributes:
        difference: d, float32 [h, w]; positive where the answer explains the picture better.
        best, other: names of a and b.
        n_probes: that each of them was measured on.
        evaluations: of the network, beside those of the search.
        picture: as the model saw it, a square.
    """

    difference: torch.Tensor
    best: str
    other: str
    n_probes: int
    evaluations: int
    picture: Image.Image


def next_class(found: Classification) -> int:
    """The most probable measured class beside the answer.

    Raises:
        DiveFastError: there is none.
    """
    best = found.top(2)
    if len(best) < 2:
        raise DiveFastError("only one class was measured, and there is none to compare it with.")
    return best[1]["index"]


def first_probes(probes: ProbeList) -> torch.Tensor:
    """The rows of the first probes, int64 [K]; units are whole unless there is less than one."""
    k = min(len(probes), MOST_PROBES)
    return torch.arange(k - k % probes.unit or k)


class MapSearch(DefaultProbes):
    """As a strategy: asks for the error maps of two classes, and searches for nothing.

    The answer's trace has their "difference".

    Args:
        best, other: rows of a and b in the vocabulary.
        loss: "l2", "l1" or "huber".
        watch: says when to stop.
        rows: of the network's input in one piece, about.

    Attributes:
        evaluations: so far.
    """

    name = "where"

    def __init__(self, best: int, other: int, loss: str, watch: Watch, rows: int) -> None:
        self.pair, self.loss = torch.tensor([best, other]), loss
        self.watch, self.rows, self.evaluations = watch, rows, 0

    def search(self, task: Task) -> Search:
        """Raises Stopped when the watch says so; what was known of the map is lost then."""
        probe_ids, total = first_probes(task.probes), 0.0
        per_probe = len(self.pair) * task.vocabulary.parts
        for piece in probe_ids.split(max(1, self.rows // per_probe)):
            if self.watch.stopped:
                raise Stopped
            total = total + (yield ErrorMaps(self.pair, piece)) * len(piece)
            self.evaluations += per_probe * len(piece)
        maps = total / len(probe_ids)
        losses = torch.full((len(task.vocabulary),), torch.nan)
        losses[self.pair] = maps.mean(dim=(1, 2))
        n_probes = torch.zeros(len(losses), dtype=torch.int64)
        n_probes[self.pair] = len(probe_ids)
        best, other = maps
        return Answer(int(self.pair[0]), losses, n_probes, {"difference": other - best})


def measured(
    classifier: DiffusionClassifier, x0: torch.Tensor, search: MapSearch, given: dict[str, Any]
) -> torch.Tensor:
    """d of a picture x0 [1, C, h, w], float32 [h, w]; ``given`` are its search's probes and seed.

    Raises:
        Stopped: it was told to.
        DiveFastError: the model fails.
    """
    (found,) = classifier(latents=x0, strategy=search, trace=True, **given)
    return found.trace["difference"]


def smoothed(difference: torch.Tensor) -> np.ndarray:
    """By a Gaussian of 1/16 of the sides, [h, w]; reflected at the edges, which keeps its mean."""
    sigma = [_SMOOTHED * side for side in difference.shape]
    return gaussian_filter(difference.numpy(), sigma, mode="reflect")


def drawn(where: Where) -> Image.Image:
    """The picture in pale grey: red where a explains it better, blue where b does.

    The colour is as strong as d is large, at the same scale for both.
    """
    heat = smoothed(where.difference)
    largest = float(np.abs(heat).max())
    factor = max(1, math.ceil(_LONG_SIDE / max(where.picture.size)))
    size = tuple(factor * side for side in where.picture.size)
    heat = Image.fromarray(heat / (largest or 1.0)).resize(size, Image.Resampling.BILINEAR)
    heat = np.asarray(heat)[..., None]
    grey = where.picture.convert("L").resize(size, Image.Resampling.NEAREST).convert("RGB")
    opacity = _STRONGEST * np.abs(heat)
    # Neither black nor white, on which weak colours would not be seen alike.
    pale = 64 + np.asarray(grey) / 2
    mixed = (1 - opacity) * pale + opacity * np.where(heat > 0, RED, BLUE)
    return Image.fromarray(mixed.round().astype(np.uint8))
