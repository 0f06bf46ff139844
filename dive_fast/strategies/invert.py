"""DIVE's inversion (arXiv 2504.17253) with our settings: the same search, evaluated once.

Because the projection is discrete, loss and gradient on fixed probes depend on the nearest class
alone. So a class is measured when the trajectory first meets it, and every further step there is
free. The gradients that were paid on the way say something of every other class too, and what they
put in front competes with what was met. docs/strategies.md says what each change against the paper
bought.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dive_fast.core.requests import Gradients, LossesAndGradients, Search
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import DefaultProbes, Ledger, Task
from dive_fast.strategies.elimination import Contest, PairedTest, growing_looks


@dataclass(frozen=True)
class Invert(DefaultProbes):
    """Normalised gradient descent on a relaxed embedding, projected straight-through, then a race.

        v_0 = mean of the vocabulary,   v_{i+1} = v_i - step r g_i / |g_i|,
        g_0 = dL/dv at v_0,   g_i = dL/dv at P(v_i),   r = mean distance of the rows from v_0

    on the first ``search_probes`` probes. It ends when ``patience`` new classes in a row were no
    better than the best, or after ``stall`` steps without a new class. Every point p that had a
    gradient, v_0 among them, says something of every class,

        L(y_c) ~ L(p) + g_p . (v_c - p) + kappa / 2 |v_c - p|^2,

    with the curvature kappa that fits the classes met best. The mean of these over p, weighted by
    1 / |v_c - p|^2, estimates the classes that were not met. The ``runners_up`` lowest of them
    race with all that were met, and while the leader of the first look is one of those that
    entered last, as many again enter: the search has passed by the answer. Looks are at ``growth``
    times as many probes each; those leave that ``PairedTest`` calls worse than the leader, at level
    ``error`` / looks. The lowest mean of those that stay wins. Where losses of the search were
    approximate (cache level "encoder"), the race measures its classes anew from the first probe
    on, and no other class has a loss in the answer.

    Attributes:
        search_probes: probes of the search; 2 evaluations each per class that is met.
        step: length of a step, in units of r.
        patience: new classes without improvement until the search ends.
        stall: steps without a new class until it ends.
        runners_up: classes that enter the race at a time without having been met; 0 is none.
        error: of the race: bound on the probability that a rival drives its best class out.
        growth: probes at a look of the race over those at the look before.
        metric: of the projection, "l2" or "cosine".
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "invert"
    search_probes: int = 12
    step: float = 1.0
    patience: int = 1
    stall: int = 10
    runners_up: int = 4
    error: float = 0.1
    growth: float = 1.5
    metric: str = "l2"
    loss: str = "l2"

    def __post_init__(self) -> None:
        least = {"search_probes": 1, "patience": 1, "stall": 1, "runners_up": 0}
        for key, bound in least.items():
            if getattr(self, key) < bound:
                raise DiveFastError(f"{key} must be at least {bound}, got {getattr(self, key)}.")
        if not self.step > 0:
            raise DiveFastError(f"step must be greater than 0, got {self.step}.")
        if not 0 < self.error < 1:
            raise DiveFastError(f"error must lie between 0 and 1, got {self.error}.")
        if not self.growth > 1:
            raise DiveFastError(f"growth must be greater than 1, got {self.growth}.")

    def search(self, task: Task) -> Search:
        searched = torch.arange(min(self.search_probes, len(task.probes)))
        found = Found(task)
        yield from self._descend(found, searched)
        return (yield from self._race(found, searched))

    def _descend(self, found: Found, probes: torch.Tensor):
        """The gradient search; yields requests and enters what they give."""
        vocabulary = found.task.vocabulary
        v = vocabulary.mean()[None]
        radius = vocabulary.distances(v).mean()
        reply = yield Gradients(v, probes)
        found.linearise(v[0], reply)
        gradient, best, since_best, since_new = reply.gradients, None, 0, 0
        while since_best < self.patience and since_new < self.stall:
            # Clamped: at an exactly flat point the direction is zero, and the search stalls.
            v = v - self.step * radius * gradient / gradient.norm().clamp_min(1e-30)
            nearest = vocabulary.nearest(v, self.metric)
            c = int(nearest)
            found.path.append(c)
            since_new += 1
            if c not in found.gradients:
                found.meet(nearest, probes, (yield Gradients(nearest, probes)))
                since_new = 0
                since_best = 0 if found.best() != best else since_best + 1
                best = found.best()
            gradient = found.gradients[c]

    def _race(self, found: Found, searched: torch.Tensor):
        """The classes met and the runners-up, on all probes; yields requests, gives the answer."""
        task, met, k = found.task, found.met(), len(found.task.probes)
        looks = growing_looks(len(searched), self.growth, k)
        test = PairedTest(self.error / len(looks), k, task.probes.unit)
        contest = Contest(task, looks, test)
        if found.exact:
            contest.ledger.add(met, searched, found.ledger.losses[met][:, searched])
        contest.enter(met)
        # A class that the prior excludes cannot race, and somebody has to.
        n = self.runners_up if contest.left.any() else max(self.runners_up, 1)
        unmet = found.unmet()
        entering = unmet[:n]
        contest.enter(entering)
        yield from contest.advance()
        while contest.leader() in entering:
            unmet = unmet[n:]
            entering = unmet[:n]
            contest.enter(entering)
            while contest.rounds() < 1:
                yield from contest.advance()
        while not contest.decided():
            yield from contest.advance()
        return contest.answer(path=found.path)


class Found:
    """What the search knows of one image.

    Attributes:
        path: the nearest class at each step.
        gradients: of every class met, float32 [1, D].
        ledger: their losses on the search's probes.
        exact: whether none of these reused another class's activations.
        linear: L(p) + g . (v_c - p) of every class c, float32 [C], one for each point p.
        squares: |v_c - p|^2, alike.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.path, self.exact = task, [], True
        self.gradients: dict[int, torch.Tensor] = {}
        self.ledger = Ledger(len(task.vocabulary), len(task.probes))
        self.linear: list[torch.Tensor] = []
        self.squares: list[torch.Tensor] = []

    def linearise(self, p: torch.Tensor, reply: LossesAndGradients) -> None:
        """Keeps what the gradient at a point p [D] says of every class."""
        vocabulary = self.task.vocabulary
        self.linear.append(reply.losses.mean() + vocabulary.linear(p, reply.gradients[0]))
        self.squares.append(vocabulary.distances(p).square())

    def meet(self, c: torch.Tensor, probes: torch.Tensor, reply: LossesAndGradients) -> None:
        """Enters a class [1] that had a gradient."""
        self.gradients[int(c)] = reply.gradients
        self.ledger.add(c, probes, reply.losses)
        self.exact = self.exact and reply.exact
        self.linearise(self.task.vocabulary.rows(c)[0], reply)

    def met(self) -> torch.Tensor:
        """The classes met, int64, in the order of the path."""
        return torch.tensor(list(self.gradients))

    def best(self) -> int:
        """The class of the lowest loss, with its prior, among those met."""
        return int((self.ledger.means().nan_to_num(torch.inf) + self.task.penalty()).argmin())

    def unmet(self) -> torch.Tensor:
        """The classes that were not met, int64, by rising estimate and prior."""
        order = (self.estimates() + self.task.penalty()).argsort(stable=True)
        return order[~torch.isin(order, self.met())]

    def estimates(self) -> torch.Tensor:
        """The estimated loss of every class on the search's probes, float64 [C]."""
        linear, squares = torch.stack(self.linear).double(), torch.stack(self.squares).double()
        # A class's own point, and another with the same embedding, say nothing of the curvature.
        met = self.met()
        half, error = squares[:, met] / 2, self.ledger.means()[met] - linear[:, met]
        error = error.where(half > 0, 0.0)
        kappa = ((error * half).sum() / half.square().sum().clamp_min(1e-30)).clamp_min(0)
        weight = 1 / squares.clamp_min(1e-30)
        return ((linear + kappa / 2 * squares) * weight).sum(dim=0) / weight.sum(dim=0)
