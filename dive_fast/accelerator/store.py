"""States of rows, found again by the rows' content: bounded in bytes, exact, in plain torch.

A row is found by a hash of its bytes and confirmed by comparing the bytes themselves, so a
collision of hashes costs a miss and never gives a wrong state.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# While storing is paused, this many misses per stored row without a hit start it again.
RETRY = 2
_SAMPLES = 8  # values of each parameter that `fingerprint` reads


class Rows:
    """The content of M rows.

    Args:
        context: what else a state depends on (dtype, device, autocast); rows of different contexts
            are never the same.
        parts: tensors [M, ...] whose bytes are the content, all on one device.
    """

    def __init__(self, context: Hashable, *parts: Tensor) -> None:
        shapes = tuple((part.shape[1:], part.dtype) for part in parts)
        self._parts = [_bits(part) for part in parts]
        self._keys = [(context, shapes, hash_) for hash_ in row_hashes(self._parts)]

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, row: int) -> Hashable:
        return self._keys[row]

    def content(self, row: int) -> State:
        return tuple(part[row] for part in self._parts)

    def unique(self) -> tuple[list[int], list[int]]:
        """The first row of every content, and for each row the position of its own in that list."""
        firsts: list[int] = []
        position: list[int] = []
        seen: dict[Hashable, list[int]] = {}
        for row, key in enumerate(self._keys):
            same = seen.setdefault(key, [])
            for place in same:
                if _equal(self.content(row), self.content(firsts[place])):
                    break
            else:
                place = len(firsts)
                firsts.append(row)
                same.append(place)
            position.append(place)
        return firsts, position


@dataclass(frozen=True)
class _Entry:
    content: State
    state: State

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.content, *self.state))


class ContentStore:
    """Keeps the states of rows, least recently used ones go first.

    Storing pauses once as many bytes were stored without a single hit as the store may hold: what
    is there stays, so that a cycle longer than the store still finds a part of its rows, and
    nothing more is copied where nothing repeats. It resumes after ``RETRY`` misses in a row for
    every state held.

    Args:
        limit: bytes of states and contents together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.clear()
        self.hits = self.shared = self.misses = 0

    def clear(self) -> None:
        """Forgets the states, not the counts."""
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self.nbytes = 0
        self.paused = False
        self._stored_without_hit = 0
        self._misses_in_a_row = 0

    def __len__(self) -> int:
        return len(self._entries)

    def resize(self, limit: int) -> None:
        """Sets the limit and drops what no longer fits."""
        self.limit = limit
        self._evict(limit)

    def states(self, rows: Rows, compute: Callable[[Tensor | None], State]) -> State:
        """The states of all rows, each content looked up, or else computed, once.

        Args:
            compute: called with the indices int64 [n] of the rows to compute, or None for all.

        Returns:
            The state, M rows in the order of ``rows``.
        """
        firsts, position = rows.unique()
        self.shared += len(rows) - len(firsts)
        found = {row: self._get(rows, row) for row in firsts}
        missing = [row for row in firsts if found[row] is None]
        if missing:
            everything = len(missing) == len(rows)
            fresh = compute(None if everything else torch.tensor(missing))
            for place, row in enumerate(missing):
                found[row] = tuple(x[place : place + 1] for x in fresh)
                self._put(rows, row, found[row])
            if everything:
                return fresh
        pieces = [found[firsts[place]] for place in position]
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))

    def _get(self, rows: Rows, row: int) -> State | None:
        key = rows.key(row)
        entry = self._entries.get(key)
        if entry is None or not _equal(entry.content, rows.content(row)):
            self.misses += 1
            self._misses_in_a_row += 1
            if self.paused and self._misses_in_a_row > RETRY * len(self):
                self.paused, self._stored_without_hit = False, 0
            return None
        self.hits += 1
        self._misses_in_a_row = self._stored_without_hit = 0
        self._entries.move_to_end(key)
        return entry.state

    def _put(self, rows: Rows, row: int, state: State) -> None:
        if self.paused:
            return
        content = rows.content(row)
        nbytes = sum(x.nbytes for x in (*content, *state))
        if nbytes > self.limit:
            return
        if self._stored_without_hit + nbytes > self.limit:
            self.paused, self._misses_in_a_row = True, 0
            return
        self._stored_without_hit += nbytes
        old = self._entries.pop(rows.key(row), None)
        if old is not None:
            self.nbytes -= old.nbytes
        self._evict(self.limit - nbytes)
        # Copies, as views would keep the whole batch; outside inference mode, so that a state may
        # take part in a later call that records gradients.
        with torch.inference_mode(False):
            entry = _Entry(*(tuple(x.clone() for x in part) for part in (content, state)))
        self._entries[rows.key(row)] = entry
        self.nbytes += nbytes

    def _evict(self, nbytes: int) -> None:
        """Drops the least recently used states until no more than this is held."""
        while self.nbytes > nbytes:
            _, entry = self._entries.popitem(last=False)
            self.nbytes -= entry.nbytes


def fingerprint(parameters: Iterable[nn.Parameter]) -> Hashable:
    """Changes when a parameter is replaced, moved, cast, or updated in place.

    Updates that torch counts are all seen. Writing through ``.data`` is not counted, so a few
    values of each parameter are read too: a merge of adapters or a copy of averaged weights, which
    change whole matrices, is seen.
    """
    parameters = list(parameters)
    marks = tuple(
        (id(p), p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in parameters
    )
    samples = [_sample(p) for p in parameters if not p.is_meta and p.numel() > 0]
    if not samples:
        return marks
    values = torch.cat([sample.float() for sample in samples])
    return marks, tuple(values.view(torch.int32).tolist())


def _sample(parameter: nn.Parameter) -> Tensor:
    """Some values, evenly spaced in memory, without a copy of the parameter."""
    x = parameter.detach()
    step = max(x.numel() // _SAMPLES, 1)
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x.as_strided((min(_SAMPLES, x.numel()),), (step,))
    return x.flatten()[::step][:_SAMPLES]


def row_hashes(parts: Sequence[Tensor]) -> list[int]:
    """One 64-bit hash for each row of integers: sum of the elements times fixed random numbers."""
    total = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    for place, part in enumerate(parts):
        total = total + (part.long() * _multipliers(part.shape[1], place, part.device)).sum(dim=1)
    return total.tolist()


@functools.lru_cache(maxsize=16)
def _multipliers(n: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(torch.int64)
    with torch.inference_mode(False):
        numbers = torch.randint(limits.min, limits.max, (n,), generator=generator)
        return (numbers | 1).to(device)


def _bits(x: Tensor) -> Tensor:
    """The bytes of each row as integers, [M, n]: equality is then of bits, -0.0 is not 0.0."""
    x = x.detach().contiguous()
    return x.reshape(len(x), -1).view(_INTEGERS[x.element_size()])


def _equal(a: State, b: State) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
