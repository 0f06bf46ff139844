"""DIVE's inversion (arXiv 2504.17253) with our settings: the same search, evaluated once.

Because the projection is discrete, loss and gradient on fixed probes depend on the nearest class
alone. So a class is measured when the trajectory first meets it, and every further step there is
free. docs/strategies.md says what each change against the paper bought.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dive_fast.core.requests import Gradients, Losses, Search
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import DefaultProbes, Ledger, Task


@dataclass(frozen=True)
class Invert(DefaultProbes):
    """Normalised gradient descent on a relaxed embedding, projected straight-through.

        v_0 = mean of the vocabulary,   v_{i+1} = v_i - step r g_i / |g_i|,
        g_0 = dL/dv at v_0,   g_i = dL/dv at P(v_i),   r = mean distance of the rows from v_0

    on the first ``search_probes`` probes. It ends when ``patience`` new classes in a row were no
    better than the best, or after ``stall`` steps without a new class. Then the best two are
    measured on all the other probes, and the lower mean wins. Where the engine's losses were
    approximate (cache level "encoder"), they are measured on all probes, and no other class is.

    Attributes:
        search_probes: probes of the search; 2 evaluations each per class that is met.
        step: length of a step, in units of r.
        patience: new classes without improvement until the search ends.
        stall: steps without a new class until it ends.
        metric: of the projection, "l2" or "cosine".
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "invert"
    search_probes: int = 25
    step: float = 1.0
    patience: int = 2
    stall: int = 10
    metric: str = "l2"
    loss: str = "l2"

    def __post_init__(self) -> None:
        for key in ("search_probes", "patience", "stall"):
            if getattr(self, key) < 1:
                raise DiveFastError(f"{key} must be at least 1, got {getattr(self, key)}.")
        if not self.step > 0:
            raise DiveFastError(f"step must be greater than 0, got {self.step}.")

    def search(self, task: Task) -> Search:
        n_classes, k = len(task.vocabulary), len(task.probes)
        searched = torch.arange(min(self.search_probes, k))
        rest = torch.arange(len(searched), k)
        ledger = Ledger(n_classes, k)

        v = task.vocabulary.mean()[None]
        radius = task.vocabulary.distances(v).mean()
        reply = yield Gradients(v, searched)
        gradient, gradients, exact = reply.gradients, {}, True
        best, since_best, since_new, path = None, 0, 0, []
        while since_best < self.patience and since_new < self.stall:
            # Clamped: at an exactly flat point the direction is zero, and the search stalls.
            v = v - self.step * radius * gradient / gradient.norm().clamp_min(1e-30)
            nearest = task.vocabulary.nearest(v, self.metric)
            c = int(nearest)
            path.append(c)
            since_new += 1
            if c not in gradients:
                reply = yield Gradients(nearest, searched)
                ledger.add(nearest, searched, reply.losses)
                gradients[c], exact = reply.gradients, exact and reply.exact
                since_new = 0
                found = int(ledger.means().nan_to_num(torch.inf).argmin())
                since_best = 0 if found != best else since_best + 1
                best = found
            gradient = gradients[c]

        finalists = ledger.means().nan_to_num(torch.inf).argsort()[: min(2, len(gradients))]
        if not exact:
            # Losses with another class's activations led the search; they compare nothing.
            ledger = Ledger(n_classes, k)
            rest = torch.arange(k) if len(finalists) == 2 else searched
        if len(rest) > 0 and (len(finalists) == 2 or not exact):
            losses = yield Losses(finalists, rest)
            ledger.add(finalists, rest, losses)
        winner = finalists[ledger.means()[finalists].argmin()]
        return ledger.answer(int(winner), path=path, losses=ledger.losses)
