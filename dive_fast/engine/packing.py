"""Which rows of which images go into the next batch, and what a batch is made of.

A row is one (image, probe, condition).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch

from dive_fast.core.requests import ErrorMaps, Gradients, Losses, Request
from dive_fast.engine.objective import PixelWeights
from dive_fast.engine.running import Job, Result, Running, probes_per_mean

# Of a request (``Request.group``): a batch is of one group.
Group = tuple[Hashable, ...]


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop`` of one image's request, part of one batch."""

    image: Running
    start: int
    stop: int


class Batch(NamedTuple):
    """M rows over B images and N conditions, on the CPU but for x0.

    A condition is one of an image's request, so that each has its own row of the gradient; there
    are only such as a row of the batch names.

    Attributes:
        x0: float32 [B, C, h, w].
        classes: int64 [N], the row of the run's vocabulary that each condition is, -1 if it is
            relaxed.
        relaxed: float32 [R, D], the embeddings of the relaxed ones in their order; None if R = 0.
        position: int64 [N], each condition's place among the means of its request.
        image_numbers: the number of each image, [B].
        image_index, probe_index, condition_index: int64 [M].
        weight: float32 [M], one over the number of probes of the mean that the row is part of.
        named: how many of the N conditions belong to each image, [B].
        pixel_weights: of the images, on the device; None where no image has any.
    """

    x0: torch.Tensor
    classes: torch.Tensor
    relaxed: torch.Tensor | None
    position: torch.Tensor
    image_numbers: list[int]
    image_index: torch.Tensor
    probe_index: torch.Tensor
    condition_index: torch.Tensor
    weight: torch.Tensor
    named: list[int]
    pixel_weights: PixelWeights | None = None


def fullest(running: Iterable[Running], batch_size: int) -> tuple[Group, int]:
    """The group of requests with the most open rows, an image counting for its share at most.

    Serving that group keeps batches full. Counting shares, an image of very many rows neither keeps
    other images from being started nor its own kind in service for good.
    """
    share = _share(batch_size)
    rows: dict[Group, int] = dict.fromkeys(((Losses,), (Gradients,), (ErrorMaps,)), 0)
    for image in running:
        group = image.request.group
        rows[group] = rows.get(group, 0) + min(share, image.pending_rows)
    group = max(rows, key=rows.__getitem__)
    return group, rows[group]


def pack(running: Iterable[Running], group: Group, batch_size: int) -> list[Chunk]:
    """Takes open rows of one group until the batch is full.

    Oldest image first, each up to its share; what then is left of the batch goes to the oldest.
    """
    images = [image for image in running if image.request.group == group]
    counts, room = [0] * len(images), batch_size
    for limit in (_share(batch_size), batch_size):
        for i, image in enumerate(images):
            more = min(room, min(limit, image.pending_rows) - counts[i])
            counts[i] += more
            room -= more
    return [
        Chunk(image, image.done_rows, image.done_rows + count)
        for image, count in zip(images, counts, strict=True)
        if count > 0
    ]


def to_batch(chunks: list[Chunk], device: torch.device) -> Batch:
    """The rows of all chunks, one chunk after the other."""
    classes, relaxed, positions = [], [], []
    image_index, probe_index, condition_index, weight = [], [], [], []
    counts: list[int] = []
    for i, (image, start, stop) in enumerate(chunks):
        request = image.request
        n, row = len(request.conditions), torch.arange(start, stop)
        # Probe by probe: the conditions that share an (x_t, t) stand side by side.
        probe_index.append(request.probe_ids[row // n])
        place, share = _means(image.request, row)
        position, index = place.unique(return_inverse=True)
        named = request.conditions[position % n]
        if request.relaxed:
            relaxed.append(named.float())
            named = torch.full_like(position, -1)
        elif image.job.rows is not None:
            named = image.job.rows[named]
        classes.append(named)
        positions.append(position)
        condition_index.append(index + sum(counts))
        image_index.append(torch.full_like(row, i))
        weight.append(share)
        counts.append(len(position))
    return Batch(
        x0=torch.stack([chunk.image.job.x0 for chunk in chunks]).to(device),
        classes=torch.cat(classes),
        relaxed=torch.cat(relaxed) if relaxed else None,
        position=torch.cat(positions),
        image_numbers=[chunk.image.number for chunk in chunks],
        image_index=torch.cat(image_index),
        probe_index=torch.cat(probe_index),
        condition_index=torch.cat(condition_index),
        weight=torch.cat(weight),
        named=counts,
        pixel_weights=_pixel_weights([chunk.image.job for chunk in chunks], device),
    )


def scatter(chunks: list[Chunk], batch: Batch, result: Result, seconds: float) -> None:
    """Hands every image its part of what a batch gave, and its share of the seconds."""
    row = condition = 0
    for (image, start, stop), named in zip(chunks, batch.named, strict=True):
        count = stop - start
        rows, conditions = slice(row, row + count), slice(condition, condition + named)
        image.add(result.part(rows, conditions), batch.position[conditions])
        image.seconds += seconds * count / len(result.values)
        row, condition = rows.stop, conditions.stop


def _pixel_weights(jobs: list[Job], device: torch.device) -> PixelWeights | None:
    """What the pixels of the jobs' images count."""
    given = [job.pixel_weights is not None for job in jobs]
    if not any(given):
        return None
    values = torch.ones(len(jobs), *jobs[0].x0.shape[1:])
    for i, job in enumerate(jobs):
        if given[i]:
            weights = job.pixel_weights.double()
            values[i] = weights / weights.mean()
    return PixelWeights(values.to(device), torch.tensor(given, device=device))


def _means(request: Request, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which mean each row is part of, int64 [m], and its share in it, float32 [m].

    Rows go through the conditions, probe by probe; means of a request are counted likewise.
    """
    n, k = len(request.conditions), len(request.probe_ids)
    per = probes_per_mean(request)
    group = row // n // per
    size = (k - group * per).clamp(max=per)
    return group * n + row % n, 1 / size


def _share(batch_size: int) -> int:
    """Rows of a batch that one image may take while others wait: half."""
    return -(-batch_size // 2)
