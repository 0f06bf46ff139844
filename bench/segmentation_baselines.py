"""What error maps are compared with on the scenes: thresholds, boxes, attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from dive_fast import Detections, DiffusionClassifier, LayoutDetector
from dive_fast.data.images import from_bytes
from dive_fast.data.scenes import CANVAS, NAMES, STEP, Scenes
from dive_fast.predict.segmenting_layouts import MAP_PROBES
from dive_fast.strategies.layout import Board, Box, Item, resolve_layout_strategy

BACKGROUND = len(NAMES)
LEAST_INK = 6  # pixels of a component that may be a digit


def otsu(image: np.ndarray) -> int:
    """The grey level, of uint8 [h, w], at which two classes differ most (Otsu, 1979)."""
    counts = np.bincount(image.ravel(), minlength=256).astype(float)
    below = counts.cumsum()
    mass = (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    both = (below > 0) & (above > 0)
    means = np.zeros(256), np.zeros(256)
    means[0][both] = mass[both] / below[both]
    means[1][both] = (mass[-1] - mass[both]) / above[both]
    return int((below * above * (means[1] - means[0]) ** 2 * both).argmax())


def nearest_object(found: Detections) -> np.ndarray:
    """Which object a pixel is of: of those whose boxes hold it the one with the nearest centre.

    int64 [32, 32], -1 for none.
    """
    y, x = np.mgrid[:CANVAS, :CANVAS] + 0.5
    distances = np.full((len(found) + 1, CANVAS, CANVAS), np.inf)
    for i, (left, top, right, bottom) in enumerate(found.xyxy.tolist()):
        inside = (x > left) & (x < right) & (y > top) & (y < bottom)
        away = np.hypot(x - (left + right) / 2, y - (top + bottom) / 2)
        distances[i] = np.where(inside, away, np.inf)
    distances[-1] = 1e6
    nearest = distances.argmin(axis=0)
    return np.where(nearest == len(found), -1, nearest)


def in_boxes(foreground: np.ndarray, found: Detections) -> np.ndarray:
    """The class of the object for foreground within a box, else the background."""
    names = np.append(found.class_id.numpy(), BACKGROUND)
    return np.where(foreground, names[nearest_object(found)], BACKGROUND)


def filled(found: Detections) -> np.ndarray:
    return in_boxes(np.ones((CANVAS, CANVAS), bool), found)


def digits_of_components(classifier: DiffusionClassifier, image: np.ndarray) -> np.ndarray:
    """Otsu's foreground in connected parts, each told by the classifier of digits: no layouts."""
    parts, n = ndimage.label(image > otsu(image), np.ones((3, 3)))
    labels = np.full(image.shape, BACKGROUND)
    regions = [i for i in range(1, n + 1) if (parts == i).sum() >= LEAST_INK]
    crops = [_square(np.where(parts == i, image, 0)) for i in regions]
    if crops:
        for i, answer in zip(regions, classifier(crops), strict=True):
            labels[parts == i] = answer.index
    return labels


def _square(image: np.ndarray) -> Image.Image:
    """The ink, in the middle of a dark square as high or as wide as it."""
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    ink = Image.fromarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    side = max(ink.size)
    square = Image.new("L", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square


class Attention:
    """Attention of the layout network from the pixels' tokens to those of each object.

    The mean over layers, heads and the probes of the error maps; the three tokens of an object
    (class and corners) are added. The network computes as it always does: only its attention is
    written out, softmax(Q K^T / sqrt(d)) V.
    """

    probes = MAP_PROBES

    def __init__(self, detector: LayoutDetector) -> None:
        self.model = detector.model
        self.probe_list = detector.probe_list(resolve_layout_strategy(None, {}))
        self.board = Board(
            self.model.vocabulary.table, self.model.layout_format, self.probe_list, 0, None
        )
        self.encode = detector.encode_pixels
        self.patches = CANVAS // self.model.network.config.patch_size

    def maps(self, made: Scenes, objects: Sequence[Detections]) -> list[Tensor]:
        """Of each scene [n, 32, 32], bilinear from the patches, divided by the largest."""
        x0 = self.encode(from_bytes(torch.from_numpy(made.images))[:, None])
        return [self._of_scene(x, found) for x, found in zip(x0, objects, strict=True)]

    def cut(
        self, maps: Sequence[Tensor], objects: Sequence[Detections], share: float, inside: bool
    ) -> np.ndarray:
        """Labels: the object with the most attention where that is more than a share of its
        largest, within its box only if so asked."""
        return np.stack(
            [self._cut(map, found, share, inside) for map, found in zip(maps, objects, strict=True)]
        )

    def _cut(self, map: Tensor, found: Detections, share: float, inside: bool) -> np.ndarray:
        if not len(found):
            return np.full((CANVAS, CANVAS), BACKGROUND)
        values = map.numpy()
        if inside:
            values = values.copy()
            boxes = found.xyxy.round().long().tolist()
            for value, (left, top, right, bottom) in zip(values, boxes, strict=True):
                outside = np.ones(value.shape, bool)
                outside[top:bottom, left:right] = False
                value[outside] = 0
        whose = found.class_id.numpy()[values.argmax(axis=0)]
        return np.where(values.max(axis=0) > share, whose, BACKGROUND)

    @torch.no_grad()
    def _of_scene(self, x0: Tensor, found: Detections) -> Tensor:
        if not len(found):
            return torch.zeros(0, CANVAS, CANVAS)
        sides = (found.xyxy / STEP).round().long().tolist()
        items = tuple(
            Item(c, Box(*box)) for c, box in zip(found.class_id.tolist(), sides, strict=True)
        )
        condition = self.board.conditions([items]).flatten(1).expand(self.probes, -1)
        t = self.probe_list.timesteps[: self.probes]
        noise = self.probe_list.noise[self.probe_list.noise_index[: self.probes]]
        a, s = (x[t].view(-1, 1, 1, 1) for x in (self.model.schedule.a, self.model.schedule.s))
        n_pixels = self.patches**2
        with written_out() as kept:
            self.model.predict(a * x0 + s * noise, t, condition)
        # The pixels' tokens stand first; the layout encoder's own attention has none.
        joint = [w for w in kept if w.shape[-1] > n_pixels]
        mean = torch.stack([w[:, :, :n_pixels, n_pixels:].mean(dim=(0, 1)) for w in joint]).mean(0)
        tokens = mean.T[: 3 * len(items)].unflatten(0, (len(items), 3)).sum(dim=1)
        maps = tokens.view(1, len(items), self.patches, self.patches)
        maps = F.interpolate(maps, (CANVAS, CANVAS), mode="bilinear", align_corners=False)[0]
        return maps / maps.amax(dim=(1, 2), keepdim=True)


@contextmanager
def written_out() -> Iterator[list[Tensor]]:
    """Keeps the weights of every attention that is computed within, [M, heads, N, N]."""
    kept: list[Tensor] = []
    fused = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        weights = scores.softmax(dim=-1)
        kept.append(weights)
        return weights @ value

    F.scaled_dot_product_attention = attention
    try:
        yield kept
    finally:
        F.scaled_dot_product_attention = fused
