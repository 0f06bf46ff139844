"""The race with fixed stages as a ceiling on what it may cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dive_fast.core.requests import Search
from dive_fast.strategies import Race, Task
from dive_fast.strategies.elimination import Contest, PairedTest
from dive_fast.strategies.race import looks_every


@dataclass(frozen=True)
class CappedRace:
    """Elimination by confidence, and by rank where stages say so.

    Looks, test and error are those of ``Race()``. At each cap ``(samples, keep)`` the best ``keep``
    of those still racing go on, without any guarantee, as in Diffusion Classifier
    (arXiv 2303.16203). It never takes more evaluations than the stages alone.

    Attributes:
        caps: samples rise; the last samples are the number of probes, and its keep is 1.
    """

    caps: tuple[tuple[int, int], ...]

    def search(self, task: Task) -> Search:
        c, k, race, keep = len(task.vocabulary), len(task.probes), Race(), dict(self.caps)
        looks = tuple(sorted({*looks_every(race.min_probes, race.round_probes, k), *keep}))
        test = PairedTest(race.error / (len(looks) * max(c - 1, 1)), k, task.probes.unit)
        contest = Contest(task, looks, test)
        contest.enter(torch.arange(c))
        for n in looks:
            yield from contest.advance(keep.get(n))
            if contest.decided():
                break
        return contest.answer()
