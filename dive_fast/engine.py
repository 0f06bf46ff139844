"""Runs the strategies of many images at once and packs their requests into full batches.

The only place that knows about batch size, device and memory. A row is one (image, probe,
condition); an evaluation is one forward of the network on one row, or one backward.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dive_fast.errors import DiveFastError
from dive_fast.models.protocol import Model
from dive_fast.objective import DeviceProbes, Objective
from dive_fast.probes import ProbeList
from dive_fast.requests import Answer, Gradients, Losses, LossesAndGradients, Search


@dataclass(frozen=True)
class Job:
    """One image to be classified: ``key`` comes back with the answer, x0 is float32 [C, h, w]."""

    key: Any
    x0: torch.Tensor
    search: Search


class Finished(NamedTuple):
    """An answer and what it cost: evaluations, and this image's share of the seconds."""

    key: Any
    answer: Answer
    evaluations: int
    seconds: float


@dataclass
class _Running:
    """An image on its way: its open request, how many rows of it are done, and their results."""

    job: Job
    request: Losses | Gradients | None = None
    done_rows: int = 0
    losses: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [k, n], probe by probe
    gradients: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [n, D]
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
            self.losses = torch.empty(k, n)
            self.gradients = torch.zeros(self.request.conditions.shape)
            self.done_rows = 0
        except StopIteration as stop:
            self.request, self.answer = None, stop.value
        self.seconds += time.perf_counter() - start


class _Chunk(NamedTuple):
    """Rows ``start`` to ``stop`` of one image's request, part of one batch."""

    image: _Running
    start: int
    stop: int


class Engine:
    """Continuous batching of strategies over one model.

    Args:
        model: the frozen network.
        batch_size: rows per forward at most; halved for good whenever memory runs out.
        on_batch: called with the number of evaluations of every finished batch.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int = 256,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if batch_size < 1:
            raise DiveFastError(f"batch_size must be at least 1, got {batch_size}.")
        self.model = model
        self.batch_size = batch_size
        self.on_batch = on_batch

    def run(
        self, jobs: Iterable[Job], probes: ProbeList, objective: Objective
    ) -> Iterator[Finished]:
        """Yields every job's answer as soon as it is found, not always in the order of the jobs.

        Jobs are taken only as fast as batches need them, so ``jobs`` may read its images lazily.
        """
        placed = objective.place(self.model, probes)
        waiting, running, exhausted = iter(jobs), [], False
        while True:
            kind, rows = _fullest(running)
            while rows < self.batch_size and not exhausted:
                job = next(waiting, None)
                if job is None:
                    exhausted = True
                    break
                image = _Running(job)
                image.resume(None)
                if image.answer is not None:
                    yield _finish(image)
                    continue
                running.append(image)
                kind, rows = _fullest(running)
            if not running:
                return
            chunks = self._compute(running, kind, placed, objective)
            for image in (chunk.image for chunk in chunks):
                if image.pending_rows == 0:
                    image.resume(_reply(image))
                if image.answer is not None:
                    running.remove(image)
                    yield _finish(image)

    def _compute(
        self, running: list[_Running], kind: type, placed: DeviceProbes, objective: Objective
    ) -> list[_Chunk]:
        """One batch of the given kind, smaller if memory runs out."""
        while True:
            chunks = _pack(running, kind, self.batch_size)
            start = time.perf_counter()
            try:
                losses, gradients = self._forward(chunks, kind, placed, objective)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error) or self.batch_size == 1:
                    raise
                # The failed batch may have been smaller than the limit.
                tried = sum(chunk.stop - chunk.start for chunk in chunks)
                self.batch_size = max(1, min(self.batch_size, tried) // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                warnings.warn(
                    f"out of memory with {tried} rows; going on with {self.batch_size} per batch",
                    stacklevel=2,
                )
                continue
            self._scatter(chunks, kind, losses, gradients, time.perf_counter() - start)
            return chunks

    def _forward(
        self, chunks: list[_Chunk], kind: type, placed: DeviceProbes, objective: Objective
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses [M] and, for gradients, dL/dv of every embedding in the batch, on the CPU."""
        device = self.model.device
        x0 = torch.stack([chunk.image.job.x0 for chunk in chunks]).to(device)
        embeddings = torch.cat([chunk.image.request.conditions for chunk in chunks])
        image_index, probe_index, condition_index, weight, base = [], [], [], [], 0
        for i, (image, start, stop) in enumerate(chunks):
            n = len(image.request.conditions)
            row = torch.arange(start, stop)
            # Probe by probe: the conditions that share an (x_t, t) stand side by side.
            probe_index.append(image.request.probe_ids[row // n])
            condition_index.append(row % n + base)
            image_index.append(torch.full_like(row, i))
            weight.append(torch.full((len(row),), 1 / len(image.request.probe_ids)))
            base += n
        image_index, probe_index, condition_index, weight = (
            torch.cat(part).to(device)
            for part in (image_index, probe_index, condition_index, weight)
        )
        embeddings = embeddings.to(device, torch.float32)
        with_gradient = kind is Gradients
        with torch.set_grad_enabled(with_gradient):
            embeddings = embeddings.detach().requires_grad_(with_gradient)
            condition = embeddings[condition_index]
            losses = objective.losses(self.model, x0, image_index, placed, probe_index, condition)
            if not with_gradient:
                return losses.cpu(), None
            # Every embedding owns its rows, so one backward serves all images.
            (gradients,) = torch.autograd.grad((losses * weight).sum(), embeddings)
        return losses.detach().cpu(), gradients.cpu()

    def _scatter(
        self,
        chunks: list[_Chunk],
        kind: type,
        losses: torch.Tensor,
        gradients: torch.Tensor | None,
        seconds: float,
    ) -> None:
        """Hands every image its part of the batch and its share of the cost."""
        per_row = 2 if kind is Gradients else 1
        rows, base, total = 0, 0, len(losses)
        for image, start, stop in chunks:
            count, n = stop - start, len(image.request.conditions)
            image.losses.view(-1)[start:stop] = losses[rows : rows + count]
            if gradients is not None:
                image.gradients += gradients[base : base + n]
            image.done_rows = stop
            image.evaluations += per_row * count
            image.seconds += seconds * count / total
            rows, base = rows + count, base + n
        if self.on_batch is not None:
            self.on_batch(per_row * total)


def _fullest(running: list[_Running]) -> tuple[type, int]:
    """The kind of request with the most open rows. Serving that kind keeps batches full."""
    rows = {Losses: 0, Gradients: 0}
    for image in running:
        rows[type(image.request)] += image.pending_rows
    kind = max(rows, key=rows.__getitem__)
    return kind, rows[kind]


def _pack(running: list[_Running], kind: type, batch_size: int) -> list[_Chunk]:
    """Takes open rows of one kind, oldest image first, until the batch is full."""
    chunks, room = [], batch_size
    for image in running:
        if room == 0:
            break
        if isinstance(image.request, kind):
            count = min(room, image.pending_rows)
            chunks.append(_Chunk(image, image.done_rows, image.done_rows + count))
            room -= count
    return chunks


def _reply(image: _Running) -> torch.Tensor | LossesAndGradients:
    losses = image.losses.T.contiguous()
    if isinstance(image.request, Gradients):
        return LossesAndGradients(losses, image.gradients)
    return losses


def _finish(image: _Running) -> Finished:
    return Finished(image.job.key, image.answer, image.evaluations, image.seconds)


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator raises a plain RuntimeError.
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
