"""Which rows of which images go into the next batch, and what a batch is made of.

A row is one (image, probe, condition).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dive_fast.core.requests import Answer, ErrorMaps, Gradients, Losses, Request, Search
from dive_fast.errors import DiveFastError


@dataclass(frozen=True)
class Job:
    """One image to be classified: ``key`` comes back with the answer, x0 is float32 [C, h, w]."""

    key: Any
    x0: torch.Tensor
    search: Search


@dataclass
class Running:
    """An image on its way: its open request, how many rows of it are done, and their results."""

    number: int  # in the order of the jobs; what the caches know it by
    job: Job
    request: Request | None = None
    done_rows: int = 0
    losses: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [k, n], probe by probe
    # Means over the probes: gradients [n, D] or error maps [n, h, w].
    means: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    exact: bool = True  # no row of the open request reused another condition's activations
    answer: Answer | None = None
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def pending_rows(self) -> int:
        return self.losses.numel() - self.done_rows

    def resume(self, reply: Any) -> None:
        """Lets the strategy think until its next request or its answer."""
        start = time.perf_counter()
        try:
            self.request = self.job.search.send(reply)
            n, k = len(self.request.conditions), len(self.request.probe_ids)
            if n * k == 0:
                raise DiveFastError(f"a request needs conditions and probes, got {n} and {k}.")
            classes = self.request.classes
            if classes is not None and len(classes) != n:
                raise DiveFastError(
                    f"a request of {n} conditions needs as many classes, got {len(classes)}."
                )
            self.losses = torch.empty(k, n)
            is_map = isinstance(self.request, ErrorMaps)
            shape = self.job.x0.shape[1:] if is_map else self.request.conditions.shape[1:]
            self.means = torch.zeros(n, *shape)
            self.done_rows, self.exact = 0, True
        except StopIteration as stop:
            self.request, self.answer = None, stop.value
        self.seconds += time.perf_counter() - start


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop`` of one image's request, part of one batch."""

    image: Running
    start: int
    stop: int


class Batch(NamedTuple):
    """M rows over B images and N conditions, on the CPU but for x0.

    Attributes:
        x0: float32 [B, C, h, w].
        conditions: float32 [N, D]; the requests' conditions end to end, so that each has its own
            row of the gradient.
        classes: the vocabulary row of each condition [N], None for relaxed embeddings.
        image_numbers: the number of each image, [B].
        image_index, probe_index, condition_index: int64 [M].
        position: int64 [M], each row's condition within its request.
        weight: float32 [M], one over the number of probes of the row's request.
    """

    x0: torch.Tensor
    conditions: torch.Tensor
    classes: list[int | None]
    image_numbers: list[int]
    image_index: torch.Tensor
    probe_index: torch.Tensor
    condition_index: torch.Tensor
    position: torch.Tensor
    weight: torch.Tensor


def fullest(running: Iterable[Running], batch_size: int) -> tuple[type, int]:
    """The kind of request with the most open rows, an image counting for its share at most.

    Serving that kind keeps batches full. Counting shares, an image of very many rows neither keeps
    other images from being started nor its own kind in service for good.
    """
    share, rows = _share(batch_size), dict.fromkeys((Losses, Gradients, ErrorMaps), 0)
    for image in running:
        rows[type(image.request)] += min(share, image.pending_rows)
    kind = max(rows, key=rows.__getitem__)
    return kind, rows[kind]


def pack(running: Iterable[Running], kind: type, batch_size: int) -> list[Chunk]:
    """Takes open rows of one kind until the batch is full.

    Oldest image first, each up to its share; what then is left of the batch goes to the oldest.
    """
    images = [image for image in running if isinstance(image.request, kind)]
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
    images = [chunk.image for chunk in chunks]
    classes: list[int | None] = []
    image_index, probe_index, position, condition_index, weight = [], [], [], [], []
    for i, (image, start, stop) in enumerate(chunks):
        request = image.request
        n, row = len(request.conditions), torch.arange(start, stop)
        # Probe by probe: the conditions that share an (x_t, t) stand side by side.
        probe_index.append(request.probe_ids[row // n])
        position.append(row % n)
        condition_index.append(row % n + len(classes))
        image_index.append(torch.full_like(row, i))
        weight.append(torch.full((len(row),), 1 / len(request.probe_ids)))
        known = request.classes is not None
        classes += request.classes.tolist() if known else [None] * n
    return Batch(
        x0=torch.stack([image.job.x0 for image in images]).to(device),
        conditions=torch.cat([image.request.conditions for image in images]).float(),
        classes=classes,
        image_numbers=[image.number for image in images],
        image_index=torch.cat(image_index),
        probe_index=torch.cat(probe_index),
        condition_index=torch.cat(condition_index),
        position=torch.cat(position),
        weight=torch.cat(weight),
    )


def _share(batch_size: int) -> int:
    """Rows of a batch that one image may take while others wait: half."""
    return -(-batch_size // 2)
