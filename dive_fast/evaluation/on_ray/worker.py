"""A worker: one model, which takes images as its batches need them and tells what comes of them.

Two threads of the actor wait (``give`` and ``events``), a third computes. So the engine's batches
stay full from one piece to the next, and every record leaves as soon as it is known.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from dive_fast.evaluation.encoding import images_at_once
from dive_fast.evaluation.on_ray.work import Work
from dive_fast.evaluation.run import run_over
from dive_fast.evaluation.runfiles import for_json

AT_MOST = 64  # events in one message


class Ready(NamedTuple):
    """The model is there. ``identity`` is its own, ``versions`` are the worker's."""

    identity: Any
    versions: dict[str, str]


class Want(NamedTuple):
    """Few images are left."""


class Known(NamedTuple):
    """One image's record."""

    record: Mapping[str, Any]


class Warned(NamedTuple):
    """A sentence that the library logged."""

    sentence: str


class Drained(NamedTuple):
    """All images given are answered; the rows of the batches since the last time."""

    rows: int
    capacity: int


class Failed(NamedTuple):
    """Something that no other image and no other worker would help."""

    error: BaseException


Event = Ready | Want | Known | Warned | Drained | Failed


class Worker:
    """The actor.

    Args:
        load: makes the classifier or detector.
        work: what is done with it.
        threads: of torch.
    """

    def __init__(self, load: Callable[[], Any], work: Work, threads: int) -> None:
        self._load, self._work = load, work
        self._threads = threads
        self._inbox: queue.SimpleQueue[tuple[list[int], bool]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def give(self, positions: list[int], last: bool) -> None:
        """Images to classify, as positions among the items.

        Args:
            last: do not wait for more before these are answered.
        """
        self._inbox.put((positions, last))

    def events(self) -> Iterator[list[Event]]:
        """What happens, as it happens: never ends but by a failure."""
        threading.Thread(target=self._compute, daemon=True).start()
        while True:
            events = [self._outbox.get()]
            while not self._outbox.empty() and len(events) < AT_MOST:
                events.append(self._outbox.get())
            yield events
            if isinstance(events[-1], Failed):
                return

    def _compute(self) -> None:
        try:
            torch.set_num_threads(self._threads)
            predictor = self._load()
            identity = self._work.identity
            found = None if identity is None else for_json(identity(predictor))
            self._outbox.put(Ready(found, versions()))
            # What is logged before the driver has said when it loaded the same model.
            logging.getLogger("dive_fast").addHandler(_Teller(self._outbox))
            while True:
                self._classify(predictor)
        except BaseException as error:
            self._outbox.put(Failed(_portable(error)))

    def _classify(self, predictor: Any) -> None:
        """As far as the last piece; the batches are filled across pieces."""
        sources = (self._work.source(predictor, item) for item in self._items())
        encode = self._work.encode
        run_over(
            sources,
            partial(self._work.stream, predictor),
            _Records(self._outbox),
            encode=None if encode is None else encode(predictor),
            at_once=1 if encode is None else images_at_once(predictor.model.device),
        )
        record = getattr(predictor, "last_run", None)
        rows = (0, 0) if record is None else (record.rows, record.capacity_rows)
        self._outbox.put(Drained(*rows))

    def _items(self) -> Iterator[Any]:
        piece, last = self._inbox.get()
        waiting = deque(piece)
        while waiting or not last:
            # Asked for while half a piece is left, so that the engine need not wait for it.
            if not last and len(waiting) <= len(piece) // 2:
                self._outbox.put(Want())
                while len(waiting) > 0 and self._inbox.empty():
                    yield self._work.items[waiting.popleft()]
                piece, last = self._inbox.get()
                waiting.extend(piece)
            else:
                yield self._work.items[waiting.popleft()]


class _Records:
    """Where ``run_over`` puts records: on their way to the driver, who knows which are finished."""

    def __init__(self, outbox: queue.SimpleQueue[Event]) -> None:
        self._outbox = outbox

    def finished(self, record_id: str) -> bool:
        return False

    def append(self, record: Mapping[str, Any]) -> None:
        self._outbox.put(Known(for_json(record)))


class _Teller(logging.Handler):
    """Sends what the library warns of to the driver."""

    def __init__(self, outbox: queue.SimpleQueue[Event]) -> None:
        super().__init__(logging.WARNING)
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        self._outbox.put(Warned(record.getMessage()))


def versions() -> dict[str, str]:
    """Of the packages that answers depend on, in this process."""
    import dive_fast

    return {"dive_fast": dive_fast.__version__, "torch": str(torch.__version__)}


def _portable(error: BaseException) -> BaseException:
    """An error that can be sent; of one that cannot its type and text."""
    import ray.cloudpickle as cloudpickle

    try:
        cloudpickle.loads(cloudpickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
