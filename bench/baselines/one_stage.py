"""An anchor-free one-stage detector: a residual network, one feature map of stride 2, dense boxes.

Per cell of the map: a logit for every class, and the distances from the cell's centre to the left,
top, right and bottom edges of a box (FCOS, arXiv 1904.01355, with centre sampling). A class's score
is trained to be the IoU of the predicted box (quality focal loss, arXiv 2006.04388), the box by
GIoU (arXiv 1902.09630). Duplicates go by non-maximum suppression within each class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 2
CENTRE_RADIUS = 1.5  # cells around a box's centre that answer for it
PRIOR = 0.01  # score of every class before training
MIN_SCORE = 0.01
BEFORE_NMS = 300  # candidates of an image
NMS_IOU = 0.6
MAX_DETECTIONS = 100
BOX_WEIGHT = 2.0


class Dense(NamedTuple):
    """What the network says of every cell, row by row.

    Attributes:
        logits: [B, cells, C].
        distances: [B, cells, 4], to left, top, right and bottom in pixels, positive.
    """

    logits: Tensor
    distances: Tensor


class Targets(NamedTuple):
    """What the cells are to say.

    Attributes:
        class_ids: int64 [B, cells]; -1 where no object is.
        boxes: float32 [B, cells, 4], xyxy in pixels; of no meaning where no object is.
    """

    class_ids: Tensor
    boxes: Tensor


class Found(NamedTuple):
    """The objects of one image, best first: xyxy in pixels [n, 4], class ids and scores [n]."""

    boxes: Tensor
    class_ids: Tensor
    scores: Tensor


class OneStageDetector(nn.Module):
    """The network.

    Args:
        n_classes: C.
        channels: of the stages with stride 2, 4, 8 ...
        blocks: residual blocks of each stage.
        width: channels of the feature map that the heads see.
        in_channels: of the images, 1 for grey ones.
    """

    def __init__(
        self,
        n_classes: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        width: int,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(in_channels, channels[0], 6, STRIDE), nn.ReLU())
        before = (channels[0], *channels)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    _Block(before[i] if j == 0 else c, c, stride=2 if i and j == 0 else 1)
                    for j in range(n)
                )
            )
            for i, (c, n) in enumerate(zip(channels, blocks, strict=True))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.classes = _head(width, n_classes)
        self.edges = _head(width, 4)
        nn.init.constant_(self.classes[-1].bias, -math.log((1 - PRIOR) / PRIOR))
        nn.init.constant_(self.edges[-1].bias, 3.0)  # about six pixels

    def forward(self, images: Tensor) -> Dense:
        """Images, float32 [B, c, h, w] in [-1, 1]; the last stage's stride divides h and w."""
        x, levels = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        merged = self.lateral[-1](levels[-1])
        for level, lateral in zip(levels[-2::-1], self.lateral[-2::-1], strict=True):
            merged = lateral(level) + F.interpolate(merged, scale_factor=2.0, mode="nearest")
        logits, edges = self.classes(merged), self.edges(merged)
        return Dense(
            logits.flatten(2).transpose(1, 2),
            STRIDE * F.softplus(edges.flatten(2).transpose(1, 2)),
        )


class _Block(nn.Module):
    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(before, channels, 3, stride)
        self.second = _conv(channels, channels, 3, 1)
        same = before == channels and stride == 1
        self.skip = nn.Identity() if same else _conv(before, channels, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.second(F.relu(self.first(x))))


def _conv(before: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    padding = (kernel - stride + 1) // 2
    convolution = nn.Conv2d(before, channels, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels))


def _head(width: int, outputs: int) -> nn.Sequential:
    last = nn.Conv2d(width, outputs, 3, padding=1)
    nn.init.normal_(last.weight, std=0.01)
    return nn.Sequential(nn.ReLU(), _conv(width, width, 3, 1), nn.ReLU(), last)


def as_input(images: Tensor) -> Tensor:
    """Grey images, uint8 [B, h, w], as the network takes them."""
    return images.float().div(127.5).sub(1).unsqueeze(1)


def centres(height: int, width: int) -> Tensor:
    """x and y of the cells' centres in pixels, [cells, 2], for an image of that size."""
    y, x = torch.meshgrid(
        torch.arange(height // STRIDE), torch.arange(width // STRIDE), indexing="ij"
    )
    return STRIDE * (torch.stack([x, y], dim=2).flatten(0, 1) + 0.5)


def assign(boxes: Tensor, class_ids: Tensor, height: int, width: int) -> Targets:
    """Each cell's object: one that it lies in, near the centre of; of several the smallest.

    Args:
        boxes: float32 [B, n, 4], xyxy in pixels.
        class_ids: int64 [B, n]; -1 where no object is.
        height, width: of the images.
    """
    points = centres(height, width)
    inside = _distances(points, boxes[:, :, None]).amin(dim=3) > 0  # [B, n, cells]
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    off = (points - middle[:, :, None]).abs().amax(dim=3)
    mine = inside & (off < CENTRE_RADIUS * STRIDE) & (class_ids >= 0)[:, :, None]
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=2)
    smallest, chosen = torch.where(mine, area[:, :, None], math.inf).min(dim=1)  # [B, cells]
    return Targets(
        torch.where(smallest < math.inf, class_ids.gather(1, chosen), -1),
        boxes.gather(1, chosen[:, :, None].expand(-1, -1, 4)),
    )


def detection_loss(dense: Dense, targets: Targets, height: int, width: int) -> Tensor:
    """Quality focal loss of the classes and GIoU loss of the boxes, per cell with an object."""
    chosen = targets.class_ids >= 0
    n = chosen.sum().clamp_min(1)
    points = centres(height, width).expand(len(chosen), -1, -1)
    iou, giou = _overlap(_boxes(points[chosen], dense.distances[chosen]), targets.boxes[chosen])
    wanted = torch.zeros_like(dense.logits)
    rows, cells = chosen.nonzero(as_tuple=True)
    wanted[rows, cells, targets.class_ids[chosen]] = iou.detach()
    error = F.binary_cross_entropy_with_logits(dense.logits, wanted, reduction="none")
    classes = (error * (dense.logits.sigmoid() - wanted).square()).sum() / n
    return classes + BOX_WEIGHT * (1 - giou).sum() / n


def decode(dense: Dense, height: int, width: int) -> list[Found]:
    """The objects of every image, 100 at most; boxes are cut at the image's edges."""
    limits = torch.tensor([width, height, width, height])
    boxes = _boxes(centres(height, width), dense.distances).clamp_min(0).minimum(limits)
    return [
        _best(scores, there)
        for scores, there in zip(dense.logits.sigmoid(), boxes.unbind(0), strict=True)
    ]


def _best(scores: Tensor, boxes: Tensor) -> Found:
    """From scores [cells, C] and boxes [cells, 4]."""
    real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    cells, class_ids = ((scores > MIN_SCORE) & real[:, None]).nonzero(as_tuple=True)
    scores, order = scores[cells, class_ids].sort(descending=True, stable=True)
    scores, order = scores[:BEFORE_NMS], order[:BEFORE_NMS]
    boxes, class_ids = boxes[cells[order]], class_ids[order]
    # Boxes of different classes are moved apart, so that none suppresses another's.
    apart = boxes + (class_ids * (boxes.max() + 1) if len(boxes) else class_ids)[:, None]
    kept = nms(apart, scores, NMS_IOU)[:MAX_DETECTIONS]
    return Found(boxes[kept], class_ids[kept], scores[kept])


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Rows of the boxes that no better kept one overlaps with a larger IoU, best first."""
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    covered = _overlap(boxes[:, None], boxes[None])[0] > threshold
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if kept[i]:
            kept[i + 1 :] &= ~covered[i, i + 1 :]
    return order[kept]


def _distances(points: Tensor, boxes: Tensor) -> Tensor:
    """From points [..., 2] to the left, top, right and bottom of boxes [..., 4]."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def _boxes(points: Tensor, distances: Tensor) -> Tensor:
    """What ``_distances`` was taken of, xyxy."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of boxes with area, [..., 4] xyxy."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp_min(0).prod(dim=-1)

    shared = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - shared
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    iou = shared / union
    return iou, iou - (hull - union) / hull
