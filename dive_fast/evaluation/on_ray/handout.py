"""Which images are still to be handed out, and what becomes of those whose worker died."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable

DEATHS = 3  # of workers, after which an image gets no more of them


class Handout:
    """Positions of images, each to be given until its record is there.

    An image in flight when its worker died is given again: first like any other, the next time
    alone, so that of all that were in flight only the one at fault is given up.

    Args:
        positions: of what is to do.
        piece: how many a worker gets at a time at most.
        workers: how many share the end.
    """

    def __init__(self, positions: Iterable[int], piece: int, workers: int) -> None:
        self._fresh = array("q", positions)
        self._next = 0
        self._piece, self._workers = piece, workers
        self._again: deque[int] = deque()
        self._alone: deque[int] = deque()
        self._deaths: Counter[int] = Counter()

    def __len__(self) -> int:
        """How many nobody has now."""
        return len(self._fresh) - self._next + len(self._again) + len(self._alone)

    def take(self, idle: bool) -> list[int]:
        """A piece, of fewer images towards the end; empty where there is none for this worker.

        Args:
            idle: the worker has nothing in flight: it may get an image that must be alone.
        """
        shared = len(self) - len(self._alone)
        if shared == 0:
            return [self._alone.popleft()] if self._alone and idle else []
        # Guided self-scheduling: the last pieces are small, so that all end together.
        count = max(1, min(self._piece, shared // (2 * self._workers)))
        piece = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        start, self._next = self._next, min(self._next + count - len(piece), len(self._fresh))
        return piece + self._fresh[start : self._next].tolist()

    def must_be_alone(self, position: int) -> bool:
        """Whether nothing may be in flight beside it."""
        return self._deaths[position] >= DEATHS - 1

    def lost(self, positions: Iterable[int]) -> list[int]:
        """Takes back what was in flight when a worker died; returns those that are given up."""
        given_up = []
        for position in positions:
            self._deaths[position] += 1
            if self._deaths[position] >= DEATHS:
                given_up.append(position)
            elif self.must_be_alone(position):
                self._alone.append(position)
            else:
                self._again.append(position)
        return given_up
