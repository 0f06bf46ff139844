"""Which rows of which images go into the next batch, and what a batch is made of.

A row is one (image, probe, condition).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dive_fast.core.requests import (
    Answer,
    ErrorMaps,
    Gradients,
    Losses,
    LossesAndGradients,
    Request,
    Search,
)
from dive_fast.errors import DiveFastError


@dataclass(frozen=True)
class Job:
    """One image to be classified: ``key`` comes back with the answer, x0 is float32 [C, h, w]."""

    key: Any
    x0: torch.Tensor
    search: Search


class Result(NamedTuple):
    """What the network said of a batch of M rows and N conditions, on the CPU.

    Attributes:
        losses: float32 [M].
        means: the mean over a request's probes, as far as they are in the batch: float32 [N, D] of
            every condition's gradient, or [N, h, w] of its error map. None for losses alone.
        exact: bool [M], the rows that reused no other condition's activations; None if all.
    """

    losses: torch.Tensor
    means: torch.Tensor | None = None
    exact: torch.Tensor | None = None

    @property
    def reused_rows(self) -> int:
        return 0 if self.exact is None else int((~self.exact).sum())

    def part(self, rows: slice, conditions: slice) -> Result:
        means, exact = self.means, self.exact
        return Result(
            self.losses[rows],
            None if means is None else means[conditions],
            None if exact is None else exact[rows],
        )


@dataclass
class Running:
    """An image on its way: its open request, how many rows of it are done, and their results."""

    number: int  # in the order of the jobs; what the caches know it by
    job: Job
    n_classes: int  # rows of the vocabulary that a request may name
    request: Request | None = None
    done_rows: int = 0
    losses: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [k, n], probe by probe
    means: torch.Tensor | None = None  # over the probes: gradients [n, D] or error maps [n, h, w]
    reused_rows: int = 0  # of the open request, that took another condition's activations
    answer: Answer | None = None
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def pending_rows(self) -> int:
        return self.losses.numel() - self.done_rows

    def resume(self) -> None:
        """Lets the strategy think until its next request or its answer, once it has the reply."""
        if self.pending_rows > 0:
            return
        start = time.perf_counter()
        try:
            self.request = self.job.search.send(self._reply())
            _check(self.request, self.n_classes)
            self.losses = torch.empty(len(self.request.probe_ids), len(self.request.conditions))
            self.means, self.done_rows, self.reused_rows = None, 0, 0
        except StopIteration as stop:
            self.request, self.answer = None, stop.value
        self.seconds += time.perf_counter() - start

    def add(self, result: Result, position: torch.Tensor) -> None:
        """Takes the results of its next rows; ``position`` of the conditions that they name."""
        n = len(result.losses)
        self.losses.view(-1)[self.done_rows : self.done_rows + n] = result.losses
        if result.means is not None:
            if self.means is None:
                self.means = torch.zeros(self.losses.shape[1], *result.means.shape[1:])
            self.means[position] += result.means
        self.reused_rows += result.reused_rows
        self.evaluations += self.request.passes * n
        self.done_rows += n

    def _reply(self) -> torch.Tensor | LossesAndGradients | None:
        if self.request is None:
            return None
        if isinstance(self.request, ErrorMaps):
            return self.means
        losses = self.losses.T.contiguous()
        if isinstance(self.request, Gradients):
            return LossesAndGradients(losses, self.means, self.reused_rows == 0)
        return losses


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
        classes: int64 [N], the row of the vocabulary that each condition is, -1 if it is relaxed.
        relaxed: float32 [R, D], the embeddings of the relaxed ones in their order; None if R = 0.
        position: int64 [N], each condition's place in its request.
        image_numbers: the number of each image, [B].
        image_index, probe_index, condition_index: int64 [M].
        weight: float32 [M], one over the number of probes of the row's request.
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
    classes, relaxed, positions = [], [], []
    image_index, probe_index, condition_index, weight = [], [], [], []
    n_conditions = 0
    for i, (image, start, stop) in enumerate(chunks):
        request = image.request
        n, row = len(request.conditions), torch.arange(start, stop)
        # Probe by probe: the conditions that share an (x_t, t) stand side by side.
        probe_index.append(request.probe_ids[row // n])
        position, index = (row % n).unique(return_inverse=True)
        named = request.conditions[position]
        if request.relaxed:
            relaxed.append(named.float())
            named = torch.full_like(position, -1)
        classes.append(named)
        positions.append(position)
        condition_index.append(index + n_conditions)
        image_index.append(torch.full_like(row, i))
        weight.append(torch.full((len(row),), 1 / len(request.probe_ids)))
        n_conditions += len(position)
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
    )


def scatter(chunks: list[Chunk], batch: Batch, result: Result, seconds: float) -> None:
    """Hands every image its part of what a batch gave, and its share of the seconds."""
    row = condition = 0
    for image, start, stop in chunks:
        count = stop - start
        # Rows go through the conditions in turn.
        named = min(count, len(image.request.conditions))
        rows, conditions = slice(row, row + count), slice(condition, condition + named)
        image.add(result.part(rows, conditions), batch.position[conditions])
        image.seconds += seconds * count / len(result.losses)
        row, condition = rows.stop, conditions.stop


def _check(request: Request, n_classes: int) -> None:
    """Raises DiveFastError for conditions that are none."""
    conditions, n, k = request.conditions, len(request.conditions), len(request.probe_ids)
    if n * k == 0:
        raise DiveFastError(f"a request needs conditions and probes, got {n} and {k}.")
    got = f"{str(conditions.dtype).removeprefix('torch.')} {list(conditions.shape)}"
    if request.relaxed:
        good = conditions.ndim == 2
    else:
        good = conditions.ndim == 1 and conditions.dtype == torch.int64
        if good:
            low, high = int(conditions.min()), int(conditions.max())
            good, got = 0 <= low and high < n_classes, f"{got} from {low} to {high}"
    if not good:
        raise DiveFastError(
            f"a request's conditions must be int64 [n] of [0, {n_classes}) or float [n, D], "
            f"got {got}."
        )


def _share(batch_size: int) -> int:
    """Rows of a batch that one image may take while others wait: half."""
    return -(-batch_size // 2)
