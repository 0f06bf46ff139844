"""The map that follows a search: its first probes, in pieces between which it can be stopped."""

from __future__ import annotations

from typing import Any

import torch

from dive_fast.app.watch import Stopped, Watch
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, Search
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.predict.explanation import Explanation, grouped_maps
from dive_fast.strategies import DefaultProbes, Task

MOST_PROBES = 32


def first_probes(probes: ProbeList) -> torch.Tensor:
    """The rows of the first probes, int64 [K]; units are whole unless there is less than one."""
    k = min(len(probes), MOST_PROBES)
    return torch.arange(k - k % probes.unit or k)


class MapSearch(DefaultProbes):
    """As a strategy: asks for the error maps of two classes, and searches for nothing.

    The answer's trace has their "maps" [G, 2, h, w] on G pieces of the probes, and the "sizes" of
    the pieces.

    Args:
        best, other: rows of a and b in the vocabulary.
        loss: "l2", "l1" or "huber".
        watch: says when to stop.
        rows: of the network's input in one piece, about; a piece is at least one unit of probes.

    Attributes:
        evaluations: so far.
    """

    name = "where"

    def __init__(self, best: int, other: int, loss: str, watch: Watch, rows: int) -> None:
        self.pair, self.loss = torch.tensor([best, other]), loss
        self.watch, self.rows, self.evaluations = watch, rows, 0

    def search(self, task: Task) -> Search:
        """Raises Stopped when the watch says so; what was known of the map is lost then."""
        per_unit = len(self.pair) * task.vocabulary.parts * task.probes.unit
        n = max(1, self.rows // per_unit) * task.probes.unit
        pieces = first_probes(task.probes).split(n)
        sizes = tuple(map(len, pieces))
        maps = yield from self._watched(grouped_maps(self.pair, pieces), task.vocabulary.parts)
        losses = torch.full((len(task.vocabulary),), torch.nan)
        of_pieces = maps.mean(dim=(2, 3))
        losses[self.pair] = torch.tensor(sizes, dtype=torch.float32) @ of_pieces / sum(sizes)
        n_probes = torch.zeros(len(losses), dtype=torch.int64)
        n_probes[self.pair] = sum(sizes)
        return Answer(int(self.pair[0]), losses, n_probes, {"maps": maps, "sizes": sizes})

    def _watched(self, search: Search, parts: int) -> Search:
        """The same requests, counted, and none after the watch has stopped."""
        reply = None
        while True:
            try:
                request = search.send(reply)
            except StopIteration as stop:
                return stop.value
            if self.watch.stopped:
                raise Stopped
            reply = yield request
            self.evaluations += len(request.conditions) * parts * len(request.probe_ids)


def measured(
    classifier: DiffusionClassifier,
    x0: torch.Tensor,
    search: MapSearch,
    given: dict[str, Any],
    picture: Any = None,
) -> Explanation:
    """The map of a picture x0 [1, C, h, w]; ``given`` are its search's probes and seed.

    Raises:
        Stopped: it was told to.
        DiveFastError: the model fails.
    """
    (found,) = classifier(latents=x0, strategy=search, trace=True, **given)
    maps, names = found.trace["maps"], classifier.names
    a, b = (names[row] for row in search.pair.tolist())
    sizes, taken = found.trace["sizes"], search.evaluations
    return Explanation(maps[:, 1] - maps[:, 0], sizes, a, b, taken, picture)
