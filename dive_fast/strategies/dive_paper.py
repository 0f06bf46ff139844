"""DIVE as published (arXiv 2504.17253), draw for draw: the baseline our figures stand against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dive_fast.core.probes import ProbeList, published_probes
from dive_fast.core.requests import Gradients, Losses, Search
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import Ledger, Task


@dataclass(frozen=True)
class DivePaper:
    """AdamW on one embedding with straight-through projection, and a monitor pass per loop.

    Every loop shuffles the probes, takes one step per batch of them, and then measures the
    projected embedding on all probes. The answer is the nearest class at the loop with the lowest
    monitor loss. Costs loops x 3 K evaluations.

    Attributes:
        loops: passes over the probes.
        batch_size: probes per step; must divide K.
        learning_rate: of AdamW, otherwise torch's defaults.
        metric: of the projection, "l2" or "cosine".
        loss: "l2" as published.
        initial_embedding: float [D]; drawn as N(mean, std^2) of the label table if None.
        permutations: int64 [K] for every loop; drawn if None.
    """

    name: ClassVar[str] = "dive-paper"
    loops: int = 20
    batch_size: int = 25
    learning_rate: float = 1e-2
    metric: str = "l2"
    loss: str = "l2"
    initial_embedding: torch.Tensor | None = field(default=None, compare=False)
    permutations: Sequence[torch.Tensor] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.loops < 1 or self.batch_size < 1:
            raise DiveFastError(
                f"loops and batch_size must be at least 1, got {self.loops} and {self.batch_size}."
            )
        if self.permutations is not None and len(self.permutations) != self.loops:
            raise DiveFastError(
                f"expected one permutation per loop ({self.loops}), got {len(self.permutations)}."
            )

    def probes(
        self, k: int | None, n_timesteps: int, shape: tuple[int, ...], seed: int
    ) -> ProbeList:
        """K = 250 unless said. The published noise table has its own seed, 42."""
        return published_probes(250 if k is None else k, n_timesteps, shape)

    def search(self, task: Task) -> Search:
        vocabulary, k = task.vocabulary, len(task.probes)
        if k % self.batch_size:
            raise DiveFastError(
                f"the number of probes must be a multiple of the batch of {self.batch_size}, "
                f"got {k}."
            )
        # The order of draws is the published one: first the embedding, then a shuffle per loop.
        generator = torch.Generator().manual_seed(task.seed)
        v = self._start(task, generator).requires_grad_()
        optimizer = torch.optim.AdamW([v], lr=self.learning_rate)
        order, all_probes = torch.arange(k), torch.arange(k)

        step_losses, step_classes, monitor_losses, monitor_classes = [], [], [], []
        ledger = Ledger(len(vocabulary), k)
        for loop in range(self.loops):
            order = order[self._permutation(loop, k, generator)]
            for batch in order.split(self.batch_size):
                nearest = vocabulary.nearest(v, self.metric)
                reply = yield Gradients(nearest, batch)
                # Straight-through: dL/dv = dL/dP(v).
                v.grad = reply.gradients
                optimizer.step()
                step_losses.append(reply.losses.mean().item())
                step_classes.append(int(nearest))
            nearest = vocabulary.nearest(v, self.metric)
            measured = yield Losses(nearest, all_probes)
            # Published as the mean of the batches' means.
            batch_means = measured.view(-1, self.batch_size).mean(dim=1)
            monitor_losses.append(batch_means.double().mean().item())
            monitor_classes.append(int(nearest))
            ledger.add(nearest, all_probes, measured)

        best = min(range(self.loops), key=monitor_losses.__getitem__)
        return ledger.answer(
            monitor_classes[best],
            step_losses=step_losses,
            step_classes=step_classes,
            monitor_losses=monitor_losses,
            monitor_classes=monitor_classes,
        )

    def _start(self, task: Task, generator: torch.Generator) -> torch.Tensor:
        """The initial embedding [1, D]."""
        dim = task.vocabulary.dim
        if self.initial_embedding is None:
            mean, std = task.vocabulary.spread()
            return torch.randn(1, dim, generator=generator) * std + mean
        given = torch.as_tensor(self.initial_embedding, dtype=torch.float32)
        if given.numel() != dim:
            raise DiveFastError(
                f"initial_embedding must have shape [{dim}], got {list(given.shape)}."
            )
        return given.detach().clone().view(1, dim)

    def _permutation(self, loop: int, k: int, generator: torch.Generator) -> torch.Tensor:
        if self.permutations is None:
            return torch.randperm(k, generator=generator)
        given = torch.as_tensor(self.permutations[loop])
        if not torch.equal(given.sort().values, torch.arange(k)):
            raise DiveFastError(f"permutation {loop} must hold each of 0 to {k - 1} once.")
        return given
