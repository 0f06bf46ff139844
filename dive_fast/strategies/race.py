"""The race: classes leave as soon as paired statistics say that they cannot win.

Sources: Diffusion Classifier (arXiv 2303.16203, adaptive stages); arXiv 2303.15233 (paired t-tests
with p = 2e-3 after at least 20 probes). The correction for looking repeatedly is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from dive_fast.errors import DiveFastError
from dive_fast.requests import Losses, Search
from dive_fast.strategies.base import DefaultProbes, Ledger, Task


@dataclass(frozen=True)
class Race(DefaultProbes):
    """Successive elimination on common probes.

    After every ``round_probes`` probes, from ``min_probes`` on, each class c is compared with the
    leader b (lowest mean) by a one-sided paired t-test on d_k = l_c,k - l_b,k:

        c leaves if  mean(d) sqrt(n) / std(d) > t_{n-1}(1 - error / (looks (C - 1)))

    The class of the lowest expected loss leaves wrongly with probability at most ``error``: at each
    look only a test against one of the C - 1 others can drop it (union bound over looks and
    rivals). That takes the paired differences for normal; probes in low-discrepancy order are
    spread more evenly than independent ones, so their means vary less than the test assumes.

    Attributes:
        error: bound on the probability of dropping the best class.
        min_probes: probes before the first look.
        round_probes: probes between looks.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "race"
    error: float = 0.01
    min_probes: int = 20
    round_probes: int = 10
    loss: str = "l2"

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise DiveFastError(f"error must lie between 0 and 1, got {self.error}.")
        for key, least in (("min_probes", 2), ("round_probes", 1)):
            if getattr(self, key) < least:
                raise DiveFastError(f"{key} must be at least {least}, got {getattr(self, key)}.")

    def search(self, task: Task) -> Search:
        table, k = task.vocabulary.table, len(task.probes)
        ledger, left = Ledger(len(table), k), torch.arange(len(table))
        first, rest = torch.arange(k)[: self.min_probes], torch.arange(k)[self.min_probes :]
        rounds = [first, *rest.split(self.round_probes)] if len(rest) else [first]
        tail = self.error / (len(rounds) * max(len(table) - 1, 1))
        left_after = []
        for probes in rounds:
            losses = yield Losses(table[left], probes)
            ledger.add(left, probes, losses)
            left = left[~self._beaten(ledger.losses[left, : int(probes[-1]) + 1], tail)]
            left_after.append(left.tolist())
            if len(left) == 1:
                break
        winner = int(left[ledger.means()[left].argmin()])
        return ledger.answer(winner, losses=ledger.losses, left=left_after)

    def _beaten(self, losses: torch.Tensor, tail: float) -> torch.Tensor:
        """Which of the classes in losses [n, k] the leader beats, bool [n]."""
        n = losses.shape[1]
        if n < 2:
            return torch.zeros(len(losses), dtype=torch.bool)
        difference = losses.double() - losses[losses.mean(dim=1).argmin()].double()
        # A class that is worse by the same amount everywhere is beaten; one that is equal is not.
        margin = difference.mean(dim=1) * math.sqrt(n)
        return margin > difference.std(dim=1) * student_t_quantile(1 - tail, n - 1)


def student_t_quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t by the Cornish-Fisher expansion about the normal one.

    To 1% for 19 degrees of freedom and more down to tails of 1e-6 (Abramowitz & Stegun 26.7.5);
    below that it is too small.
    """
    z = torch.special.ndtri(torch.tensor(p, dtype=torch.float64)).item()
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))
