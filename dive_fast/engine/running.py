"""An image on its way through the engine: what its strategy asks for, and what it has so far."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dive_fast.core.requests import (
    Answer,
    ErrorMaps,
    Gradients,
    LossesAndGradients,
    Request,
    Search,
)
from dive_fast.errors import DiveFastError


@dataclass(frozen=True)
class Job:
    """One image to be classified: ``key`` comes back with the answer, x0 is float32 [C, h, w].

    Attributes:
        rows: int64 [n], which rows of the run's vocabulary the n conditions are that the search
            names; None where they are its rows themselves.
        pixel_weights: float32 [h, w], at least 0 and not all 0, what each place of x0 counts in
            the loss; None where all count the same.
    """

    key: Any
    x0: torch.Tensor
    search: Search
    rows: torch.Tensor | None = None
    pixel_weights: torch.Tensor | None = None


class Result(NamedTuple):
    """What the network said of a batch of M rows and N conditions, on the CPU.

    Attributes:
        values: float32 [M], the loss of every row; or [M, ...], the activations asked for.
        means: the mean over a request's probes, as far as they are in the batch: float32 [N, D] of
            every condition's gradient, or [N, h, w] of its error map. None for losses alone.
        exact: bool [M], the rows that reused no other condition's activations; None if all.
    """

    values: torch.Tensor
    means: torch.Tensor | None = None
    exact: torch.Tensor | None = None

    @property
    def reused_rows(self) -> int:
        return 0 if self.exact is None else int((~self.exact).sum())

    def part(self, rows: slice, conditions: slice) -> Result:
        means, exact = self.means, self.exact
        return Result(
            self.values[rows],
            None if means is None else means[conditions],
            None if exact is None else exact[rows],
        )


@dataclass
class Running:
    """An image on its way: its open request, how many rows of it are done, and their results."""

    number: int  # in the order of the jobs; what the caches know it by
    job: Job
    n_classes: int  # that a request may name
    request: Request | None = None
    done_rows: int = 0
    n_rows: int = 0  # of the open request
    values: torch.Tensor | None = None  # of its rows, [k n, ...], probe by probe
    means: torch.Tensor | None = None  # over the probes: gradients [n, D] or error maps [n, h, w]
    reused_rows: int = 0  # of the open request, that took another condition's activations
    answer: Answer | None = None
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def pending_rows(self) -> int:
        return self.n_rows - self.done_rows

    def resume(self) -> None:
        """Lets the strategy think until its next request or its answer, once it has the reply."""
        if self.pending_rows > 0:
            return
        start = time.perf_counter()
        try:
            self.request = self.job.search.send(self._reply())
            _check(self.request, self.n_classes)
            self.n_rows = len(self.request.probe_ids) * len(self.request.conditions)
            self.values = self.means = None
            self.done_rows = self.reused_rows = 0
        except StopIteration as stop:
            self.request, self.answer = None, stop.value
        self.seconds += time.perf_counter() - start

    def add(self, result: Result, position: torch.Tensor) -> None:
        """Takes the results of its next rows; ``position`` of the conditions that they name."""
        n = len(result.values)
        if self.values is None:
            self.values = torch.empty(self.n_rows, *result.values.shape[1:])
        self.values[self.done_rows : self.done_rows + n] = result.values
        if result.means is not None:
            if self.means is None:
                groups = -(-len(self.request.probe_ids) // probes_per_mean(self.request))
                count = groups * len(self.request.conditions)
                self.means = torch.zeros(count, *result.means.shape[1:])
            self.means[position] += result.means
        self.reused_rows += result.reused_rows
        self.evaluations += self.request.passes * n
        self.done_rows += n

    def _reply(self) -> torch.Tensor | LossesAndGradients | None:
        if self.request is None:
            return None
        if isinstance(self.request, ErrorMaps):
            return self.means
        by_probe = self.values.unflatten(0, (-1, len(self.request.conditions)))
        values = by_probe.transpose(0, 1).contiguous()
        if isinstance(self.request, Gradients):
            means = self.means
            if self.request.per is not None:
                means = means.unflatten(0, (-1, len(values)))
            return LossesAndGradients(values, means, self.reused_rows == 0)
        return values


def probes_per_mean(request: Request) -> int:
    """Over how many of its probes a request wants each of its means."""
    per = request.per if isinstance(request, Gradients) else None
    return len(request.probe_ids) if per is None else per


def _check(request: Request, n_classes: int) -> None:
    """Raises DiveFastError for conditions that are none."""
    conditions, n, k = request.conditions, len(request.conditions), len(request.probe_ids)
    if n * k == 0:
        raise DiveFastError(f"a request needs conditions and probes, got {n} and {k}.")
    if isinstance(request, Gradients) and request.per is not None and request.per < 1:
        raise DiveFastError(f"a gradient needs at least 1 probe, got per={request.per}.")
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
