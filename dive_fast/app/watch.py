"""A search that can be looked at while it runs, and stopped.

A strategy is a generator of requests, so another one around it sees all that it asks for and is
told. Nothing is measured that the strategy would not measure: large requests are only handed to the
engine in pieces, which come back sooner.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, Gradients, Losses, LossesAndGradients, Request
from dive_fast.strategies import Ledger, Task
from dive_fast.strategies.layout import Board, Items

# What the engine sends for a request.
Reply = Any


class Stopped(Exception):
    """The search was told to stop."""


class Watch:
    """What one search has seen so far: the search writes it in one thread, others read it.

    Attributes:
        evaluations: forwards plus backwards of the network on one row.
    """

    _conditions = 1  # of the network, for each that a request names

    def __init__(self) -> None:
        self.evaluations = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Ends the search when its next piece of work comes back."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def begin(self, task: Any) -> Any:
        """Called when the search starts; returns the task that it shall have."""
        return task

    def add(self, request: Request, reply: Reply) -> None:
        """Enters what the engine sent for a request, or for a piece of one.

        Raises:
            Stopped: the search shall end.
        """
        rows = len(request.conditions) * len(request.probe_ids)
        with self._lock:
            self.evaluations += request.passes * rows * self._conditions
            self._enter(request, reply)
        if self.stopped:
            raise Stopped

    def end(self, request: Request, reply: Reply) -> None:
        """Called with every request and its whole reply."""

    def _enter(self, request: Request, reply: Reply) -> None:
        """What there is to keep of a piece."""


class ClassWatch(Watch):
    """Of a search for a class: the losses measured so far."""

    _ledger: Ledger | None = None

    def begin(self, task: Task) -> Task:
        with self._lock:
            self._ledger = Ledger(len(task.vocabulary), len(task.probes))
            self._conditions = task.vocabulary.parts
        return task

    def answer(self) -> Answer | None:
        """The answer if the search ended now; None before a class was measured.

        Of the classes that were measured on most probes the one of the lowest mean loss, the others
        by their paired differences to it.
        """
        with self._lock:
            if self._ledger is None:
                return None
            ledger = Ledger(*self._ledger.losses.shape)
            ledger.losses.copy_(self._ledger.losses)
        count = ledger.losses.isfinite().sum(dim=1)
        if not count.any():
            return None
        means = ledger.means().masked_fill(count < count.max(), torch.inf)
        return ledger.answer(int(means.argmin()))

    def _enter(self, request: Request, reply: Reply) -> None:
        exact = True
        if isinstance(reply, LossesAndGradients):
            reply, exact = reply.losses, reply.exact
        measured = isinstance(request, Losses | Gradients)
        if measured and exact and not request.relaxed:
            self._ledger.add(request.conditions, request.probe_ids, reply)


class LayoutWatch(Watch):
    """Of a search for a layout: which one explained the image best when it last compared some.

    Attributes:
        items: its objects, None before any were compared.
    """

    items: Items | None = None

    def __init__(self) -> None:
        super().__init__()
        self._compared: Sequence[Items] = ()

    def begin(self, task: Board) -> Board:
        known = {field.name: getattr(task, field.name) for field in fields(task)}
        return _SeenBoard(**known, seen=self.compare)

    def compare(self, layouts: Sequence[Items]) -> None:
        """The layouts that the next request names."""
        self._compared = layouts

    def end(self, request: Request, reply: Reply) -> None:
        layouts, self._compared = self._compared, ()
        if isinstance(request, Losses) and len(layouts) == len(reply):
            self.items = layouts[int(reply.mean(dim=1).argmin())]


@dataclass(frozen=True)
class _SeenBoard(Board):
    """A board that tells which layouts are asked about.

    Attributes:
        seen: called with them.
    """

    seen: Any = None

    def conditions(self, layouts: Sequence[Items]) -> torch.Tensor:
        self.seen(layouts)
        return super().conditions(layouts)


class Watched:
    """A strategy whose searches are watched: of classes or of layouts.

    Args:
        strategy: that is watched.
        watch: of the one image that it is asked about.
        rows: of the network's input in one piece, about; a request is at least one condition on one
            probe.
    """

    def __init__(self, strategy: Any, watch: Watch, rows: int) -> None:
        self.strategy, self.watch, self.rows = strategy, watch, rows
        self.name, self.loss = strategy.name, strategy.loss

    def probes(
        self, k: int | None, n_timesteps: int, shape: tuple[int, ...], seed: int
    ) -> ProbeList:
        return self.strategy.probes(k, n_timesteps, shape, seed)

    def search(self, task: Any) -> Generator[Request, Reply, Any]:
        search = self.strategy.search(self.watch.begin(task))
        reply = None
        while True:
            try:
                request = search.send(reply)
            except StopIteration as stop:
                return stop.value
            reply = yield from self._ask(request)
            self.watch.end(request, reply)

    def _ask(self, request: Request) -> Generator[Request, Reply, Reply]:
        """The reply to a request; losses are asked for in pieces of at most ``rows`` rows."""
        if not isinstance(request, Losses):
            reply = yield request
            self.watch.add(request, reply)
            return reply
        columns = []
        for probe_ids in request.probe_ids.split(max(1, self.rows // len(request.conditions))):
            pieces = []
            for conditions in request.conditions.split(self.rows):
                piece = replace(request, conditions=conditions, probe_ids=probe_ids)
                pieces.append((yield piece))
                self.watch.add(piece, pieces[-1])
            columns.append(torch.cat(pieces))
        return torch.cat(columns, dim=1)
