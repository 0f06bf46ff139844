"""Runs the strategies of many images at once and packs their requests into full batches.

The only place that knows about batch size and memory; how an image gets on is ``running``, what a
batch is made of ``packing``, how it is computed ``forward``. A row is one (image, probe,
condition); an evaluation is one forward of the network on one row, or one backward.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.engine.batch_size import rows_per_batch
from dive_fast.engine.cache import is_out_of_memory
from dive_fast.engine.forward import Forward, check_options
from dive_fast.engine.objective import Objective
from dive_fast.engine.options import EngineOptions
from dive_fast.engine.packing import Chunk, fullest, pack, scatter, to_batch
from dive_fast.engine.running import Job, Result, Running
from dive_fast.models.protocol import Model

log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """An answer and what it cost: evaluations, and this image's share of the seconds."""

    key: Any
    answer: Answer
    evaluations: int
    seconds: float


@dataclass
class EngineRecord:
    """What a run has cost so far.

    Attributes:
        batches: forwards of the network.
        rows: rows in them.
        capacity_rows: rows that would have fitted.
        evaluations: forwards plus backwards of rows, as if each went through the whole network.
        reused_rows: rows of gradients that took the encoder's output of an earlier condition.
        cache_hits, cache_misses: activations found in the cache, and computed; an entry that
            several rows of a batch share counts once.
        cache_evictions: entries that left the cache for lack of room.
        cache_bytes: the most that the cache held.
        seconds: in the network.
    """

    batches: int = 0
    rows: int = 0
    capacity_rows: int = 0
    evaluations: int = 0
    reused_rows: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_evictions: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0

    @property
    def fill_rate(self) -> float | None:
        """Share of the batches' rows that were used; None before the first batch."""
        return self.rows / self.capacity_rows if self.capacity_rows else None

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "fill_rate": self.fill_rate}


class Engine:
    """Continuous batching of strategies over one model.

    Args:
        model: the frozen network.
        batch_size: rows per forward at most; the model's default if None (see ``rows_per_batch``).
            Halved for good whenever memory runs out.
        on_batch: called with the number of evaluations of every finished batch.
        options: caching, precision and compilation.

    Attributes:
        record: what the last run has cost so far.

    Raises:
        DiveFastError: a batch size below 1, or an option that the model does not offer.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.model = model
        self.batch_size = rows_per_batch(model, batch_size)
        self.on_batch = on_batch
        self.options = EngineOptions() if options is None else options
        check_options(model, self.options)
        self.record = self._before = EngineRecord()

    def run(
        self,
        jobs: Iterable[Job],
        probes: ProbeList,
        objective: Objective,
        vocabulary: Vocabulary | None = None,
        record: EngineRecord | None = None,
    ) -> Iterator[Finished]:
        """Yields every job's answer as soon as it is found, not always in the order of the jobs.

        Jobs are taken only as fast as batches need them, so ``jobs`` may read its images lazily.

        Args:
            vocabulary: whose rows the jobs name; the model's if None.
            record: of earlier runs, which goes on with this one; a new one if None.
        """
        self.record = EngineRecord() if record is None else record
        self._before = dataclasses.replace(self.record)
        placed = objective.place(self.model, probes)
        forward = Forward(self.model, objective, placed, self.options, vocabulary)
        waiting, running = enumerate(jobs), []
        while True:
            yield from self._admit(waiting, running, forward)
            if not running:
                return
            chunks = self._step(running, forward)
            for image in (chunk.image for chunk in chunks):
                image.resume()
                if image.answer is not None:
                    running.remove(image)
                    forward.forget(image.number)
                    yield _finish(image)

    def _admit(
        self, waiting: Iterator[tuple[int, Job]], running: list[Running], forward: Forward
    ) -> Iterator[Finished]:
        """Starts images until a batch is full; yields those that have their answer at once."""
        while fullest(running, self.batch_size)[1] < self.batch_size:
            number, job = next(waiting, (None, None))
            if job is None:
                return
            n_classes = len(forward.table if job.rows is None else job.rows)
            image = Running(number, job, n_classes)
            image.resume()
            if image.answer is None:
                running.append(image)
            else:
                yield _finish(image)

    def _step(self, running: list[Running], forward: Forward) -> list[Chunk]:
        """One batch, smaller if memory runs out."""
        group, _ = fullest(running, self.batch_size)
        while True:
            chunks = pack(running, group, self.batch_size)
            start = time.perf_counter()
            try:
                batch = to_batch(chunks, self.model.device)
                result = forward.run(group, batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                rows = sum(chunk.stop - chunk.start for chunk in chunks)
                if not self._make_room(rows, forward):
                    raise
                continue
            seconds = time.perf_counter() - start
            scatter(chunks, batch, result, seconds)
            self._record(result, chunks[0].image.request.passes, seconds, forward)
            return chunks

    def _make_room(self, tried: int, forward: Forward) -> bool:
        """After ``tried`` rows did not fit: keeping less on the device, then smaller batches."""
        if released := forward.release():
            remedy = f"going on without {released}"
        elif self.batch_size == 1:
            return False
        else:
            # The failed batch may have been smaller than the limit.
            self.batch_size = max(1, min(self.batch_size, tried) // 2)
            remedy = f"going on with {self.batch_size} per batch"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory with %d rows; %s", tried, remedy)
        return True

    def _record(self, result: Result, passes: int, seconds: float, forward: Forward) -> None:
        record, rows = self.record, len(result.values)
        record.batches += 1
        record.rows += rows
        record.capacity_rows += self.batch_size
        record.evaluations += passes * rows
        record.reused_rows += result.reused_rows
        record.seconds += seconds
        if forward.cache is not None:
            before, cache = self._before, forward.cache
            record.cache_hits = before.cache_hits + cache.hits
            record.cache_misses = before.cache_misses + cache.misses
            record.cache_evictions = before.cache_evictions + cache.evictions
            record.cache_bytes = max(before.cache_bytes, cache.peak_bytes)
        if self.on_batch is not None:
            self.on_batch(passes * rows)


def _finish(image: Running) -> Finished:
    return Finished(image.job.key, image.answer, image.evaluations, image.seconds)
