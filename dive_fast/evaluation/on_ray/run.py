"""The driver: hands images to the workers, and appends every record as soon as it comes."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tqdm import tqdm

from dive_fast.errors import DiveFastError
from dive_fast.evaluation.on_ray import worker as told
from dive_fast.evaluation.on_ray.cluster import connected, reason_of
from dive_fast.evaluation.on_ray.handout import DEATHS, Handout
from dive_fast.evaluation.on_ray.options import RayOptions
from dive_fast.evaluation.on_ray.work import Work, cannot_send, loading
from dive_fast.evaluation.run import Records
from dive_fast.evaluation.runfiles import for_json

log = logging.getLogger(__name__)

SILENCE = 30.0  # seconds without any worker, after which we say that we wait
UNREAD = 8  # messages of a worker that the driver has not taken, before the worker waits


def run_on_ray(
    work: Work, predictor: Any, records: Records, options: RayOptions, *, progress: bool = False
) -> float | None:
    """Has every item answered that has no record yet, and appends a record of each as it comes.

    A worker that dies is replaced, and only what it had in flight is computed again. An image with
    which three of them died is recorded with an error.

    Args:
        work: what the workers do.
        predictor: the driver's classifier or detector; theirs must be the same.
        records: where the records go.
        options: of the cluster and its workers.
        progress: show a bar.

    Returns:
        Share of the batches' rows that were used; None if there were none.

    Raises:
        DataError: the images come as a stream, and nobody knows how many there are.
        DiveFastError: there is no such cluster or it has no room, the work cannot be sent, the
            workers have another model, or whatever they refuse.
    """
    todo = array("q", (i for i, name in enumerate(work.ids) if not records.finished(name)))
    done = len(work.ids) - len(todo)
    with tqdm(total=len(work.ids), initial=done, unit="image", disable=not progress) as bar:
        if not todo:
            return None
        with connected(options, len(todo)) as (ray, count):
            crew = _Crew(ray, work, loading(predictor, options), options, count)
            run = _Run(crew, work, predictor, records, Handout(todo, options.piece, count), bar)
            try:
                run.to_its_end()
            finally:
                crew.dismiss()
            return run.rows / run.capacity if run.capacity else None


@dataclass(eq=False)
class _Hand:
    """One worker as the driver sees it.

    Attributes:
        actor, events: Ray's handles: of the worker, and of what it tells.
        ready: its model is loaded.
        busy: it has been given images and has not yet drained them.
        given: positions in flight, by the id of their record.
    """

    actor: Any
    events: Any
    ready: bool = False
    busy: bool = False
    given: dict[str, int] = field(default_factory=dict)


class _Crew:
    """The workers: started, replaced, dismissed."""

    def __init__(
        self,
        ray: ModuleType,
        work: Work,
        load: Callable[[], Any],
        options: RayOptions,
        count: int,
    ) -> None:
        self.ray = ray
        self.hands: list[_Hand] = []
        self._options = options
        self._actor = ray.remote(told.Worker).options(
            num_cpus=options.cpus_per_worker,
            num_gpus=options.gpus_per_worker,
            max_concurrency=2,
            max_restarts=0,
        )
        try:
            self._load, self._work = ray.put(load), ray.put(work)
        except (TypeError, ValueError, AttributeError, ImportError, RecursionError) as error:
            raise cannot_send("the data, the strategy or what loads the model", error) from error
        for _ in range(count):
            self.hire()

    def hire(self) -> None:
        actor = self._actor.remote(self._load, self._work, self._options.cpus_per_worker)
        events = actor.events.options(
            num_returns="streaming", _generator_backpressure_num_objects=UNREAD
        ).remote()
        self.hands.append(_Hand(actor, events))

    def next(self, timeout: float) -> _Hand | None:
        """A worker that has something to tell; None if none has in so many seconds."""
        streams = [hand.events for hand in self.hands]
        ready, _ = self.ray.wait(streams, num_returns=1, timeout=timeout)
        if not ready:
            return None
        hand = next(hand for hand in self.hands if hand.events is ready[0])
        self.hands.remove(hand)  # to the end, so that none is served before all others
        self.hands.append(hand)
        return hand

    def told(self, hand: _Hand) -> list[told.Event]:
        """What it tells.

        Raises:
            RayError: it is dead.
        """
        return self.ray.get(next(hand.events))

    def dismiss(self, hand: _Hand | None = None) -> None:
        """Ends a worker, or all."""
        for each in [hand] if hand is not None else list(self.hands):
            self.hands.remove(each)
            self.ray.kill(each.actor)


class _Run:
    """What is to be done, who does it, and where the records go.

    Attributes:
        rows, capacity: of the workers' batches: used, and all.
    """

    def __init__(
        self,
        crew: _Crew,
        work: Work,
        predictor: Any,
        records: Records,
        handout: Handout,
        bar: tqdm,
    ) -> None:
        self.rows = self.capacity = 0
        self._crew, self._work, self._predictor = crew, work, predictor
        self._records, self._handout, self._bar = records, handout, bar
        self._expected = None if work.identity is None else for_json(work.identity(predictor))
        self._stillborn = 0  # workers that died in a row before their model was loaded
        self._heard = time.monotonic()

    def to_its_end(self) -> None:
        from ray.exceptions import RayError, RayTaskError

        while self._handout or any(hand.busy for hand in self._crew.hands):
            hand = self._crew.next(timeout=1.0)
            if hand is None:
                self._tell_waiting()
                continue
            self._heard = time.monotonic()
            try:
                events = self._crew.told(hand)
            except RayTaskError:  # what happened in its code and was not caught there
                raise
            except RayError as error:
                self._lose(hand, error)
                continue
            for event in events:
                self._take(hand, event)

    def _take(self, hand: _Hand, event: told.Event) -> None:
        match event:
            case told.Known(record):
                hand.given.pop(record["id"], None)
                self._append(record)
            case told.Want():
                piece = self._handout.take(idle=False)
                self._give(hand, piece, last=not piece)
            case told.Drained(rows, capacity):
                self.rows, self.capacity = self.rows + rows, self.capacity + capacity
                hand.busy = False
                self._start(hand)
            case told.Ready(identity, versions):
                self._stillborn = 0
                self._compare(identity, versions)
                hand.ready = True
                self._start(hand)
            case told.Warned(sentence):
                log.warning("%s", sentence)
            case told.Failed(error):
                raise error

    def _start(self, hand: _Hand) -> None:
        """Gives images to one that has none, if there are any."""
        if piece := self._handout.take(idle=True):
            self._give(hand, piece, last=self._handout.must_be_alone(piece[0]))

    def _give(self, hand: _Hand, piece: list[int], last: bool) -> None:
        hand.busy = True
        hand.given.update((self._work.ids[i], i) for i in piece)
        hand.actor.give.remote(piece, last)

    def _lose(self, hand: _Hand, error: Exception) -> None:
        """A worker is dead: another one in its place, and its images to whoever is there."""
        self._crew.dismiss(hand)
        reason = reason_of(error)
        given_up = self._handout.lost(hand.given.values())
        if not hand.ready:
            self._stillborn += 1
            log.warning("a worker died while it loaded the model (%s).", reason)
            if self._stillborn >= DEATHS:
                raise DiveFastError(
                    f"{DEATHS} workers died while they loaded the model ({reason})."
                ) from error
        else:
            count = len(hand.given) - len(given_up)
            log.warning("a worker died (%s); %d images are computed again.", reason, count)
        for position in given_up:
            self._give_up(position)
        for idle in self._crew.hands:
            if idle.ready and not idle.busy:
                self._start(idle)
        if self._handout or any(each.busy for each in self._crew.hands):
            self._crew.hire()

    def _give_up(self, position: int) -> None:
        source = self._work.source(self._predictor, self._work.items[position])
        error = f"{DEATHS} workers died with this image in flight"
        log.warning("%s: %s.", source.id, error)
        self._append({"id": source.id, **source.facts, "error": error})

    def _append(self, record: Any) -> None:
        self._records.append(record)
        self._bar.update()

    def _compare(self, identity: Any, versions: dict[str, str]) -> None:
        """That a worker has the driver's model; a warning where its versions are others."""
        if self._expected is not None and identity != self._expected:
            where = ", ".join(_different(self._expected, identity)) or "nothing"
            raise DiveFastError(
                "expected the workers to load the model that the driver has, but theirs differs in "
                f"{where}."
            )
        for package, version in told.versions().items():
            if versions[package] != version:
                log.warning(
                    "a worker has %s %s, the driver %s.", package, versions[package], version
                )

    def _tell_waiting(self) -> None:
        """One line when the cluster gives no worker for long: others may be using it."""
        waiting = not any(hand.ready for hand in self._crew.hands)
        if waiting and time.monotonic() - self._heard > SILENCE:
            log.warning("waiting for the cluster to start %d workers ...", len(self._crew.hands))
            self._heard = float("inf")


def _different(expected: Any, got: Any, name: str = "") -> Iterable[str]:
    """The names of the values that differ, of nested dictionaries."""
    if not (isinstance(expected, dict) and isinstance(got, dict)):
        return [name] if expected != got else []
    keys = sorted(expected.keys() | got.keys())
    prefix = f"{name}." if name else ""
    return [n for k in keys for n in _different(expected.get(k), got.get(k), f"{prefix}{k}")]
