"""Activations kept for later batches: bounded in bytes, the least recently used leave first.

Entries are found by explicit ids of what they were computed from, never by where a tensor lies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dive_fast.models.protocol import State


class Key(NamedTuple):
    """What an entry was computed from.

    Attributes:
        part: "prefix", "encoded" or "projected".
        image: the engine's number of the image; None where the image does not enter.
        probe: row of the probe list, or None.
        condition: "projected": the class. "encoded": the condition's position in its request, so
            that several conditions searched at once for one image do not share. Otherwise None.
    """

    part: str
    image: int | None = None
    probe: int | None = None
    condition: int | None = None


class ActivationCache:
    """States of single rows, by key.

    Args:
        capacity: bound in bytes on all that is stored. What does not fit is not stored, and what
            the device has no memory for is not either: it is computed again, never an error.

    Attributes:
        nbytes: what is stored now; ``peak_bytes`` the most so far.
        hits, misses: rows found and not found by ``get``.
        evictions: entries that left for lack of room; finished images do not count.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = self.peak_bytes = 0
        self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[Key, State] = OrderedDict()
        self._of_image: dict[int, set[Key]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, keys: Sequence[Key], compute: Callable[[torch.Tensor], State]) -> State:
        """The states of all keys, one row each; missing ones are computed and stored.

        Args:
            keys: distinct.
            compute: takes int64 [m], the positions in ``keys`` that are missing, and returns their
                states, m rows.
        """
        missing = [i for i, key in enumerate(keys) if key not in self._entries]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if not missing:
            return self.read(keys)
        computed = compute(torch.tensor(missing))
        state = computed
        if len(missing) < len(keys):
            absent = set(missing)
            held = [i for i in range(len(keys)) if i not in absent]
            order = torch.tensor(held + missing).argsort()
            state = merge(self.read([keys[i] for i in held]), computed, order)
        self.write([keys[i] for i in missing], computed)
        return state

    def read(self, keys: Sequence[Key]) -> State:
        """The states of keys that are all there, one row each."""
        rows = []
        for key in keys:
            rows.append(self._entries[key])
            self._entries.move_to_end(key)
        return tuple(torch.cat(column) for column in zip(*rows, strict=True))

    def write(self, keys: Sequence[Key], state: State) -> None:
        """Stores row i of ``state`` under ``keys[i]``, in place of what was there."""
        row_bytes = sum(x[:1].nbytes for x in state)
        room = self.capacity // max(row_bytes, 1)
        for i, key in enumerate(keys[:room]):
            self._remove(key)
            while self.nbytes + row_bytes > self.capacity:
                self._remove(next(iter(self._entries)))
                self.evictions += 1
            try:
                # Cloned: a view would keep the whole batch alive.
                entry = tuple(x[i : i + 1].detach().clone() for x in state)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.capacity = self.nbytes
                return
            self._entries[key] = entry
            self.nbytes += row_bytes
            if key.image is not None:
                self._of_image.setdefault(key.image, set()).add(key)
        self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def drop(self, image: int) -> None:
        """Forgets all that belongs to an image."""
        for key in tuple(self._of_image.get(image, ())):
            self._remove(key)

    def close(self) -> bool:
        """Forgets everything for good; whether that gave any memory back."""
        held = self.nbytes > 0
        self._entries.clear()
        self._of_image.clear()
        self.capacity = self.nbytes = 0
        return held

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.nbytes -= sum(x.nbytes for x in entry)
        if key.image is not None:
            of_image = self._of_image[key.image]
            of_image.discard(key)
            if not of_image:
                del self._of_image[key.image]


def take(state: State, index: torch.Tensor) -> State:
    """The rows ``index`` of a state; differentiable."""
    index = index.to(state[0].device)
    return tuple(x[index] for x in state)


def merge(first: State, second: State, order: torch.Tensor) -> State:
    """The rows of both, one after the other, and of those the rows ``order``."""
    both = zip(first, second, strict=True)
    return take(tuple(torch.cat(pair) for pair in both), order)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator raises a plain RuntimeError.
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
