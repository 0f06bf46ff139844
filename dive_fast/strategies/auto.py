"""``auto``: a gradient looks at all classes at once, those that may be best are measured.

What both say together is ``evidence``; the order in which they are asked is ``hunt``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dive_fast.core.requests import Search
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import DefaultProbes, Task
from dive_fast.strategies.hunt import LEAST_BUDGET, Hunt


@dataclass(frozen=True)
class Auto(DefaultProbes):
    """Looks by gradient, measures what may be best, until one class is left.

    1. The gradient at the mean of the vocabulary, a few probes at a time, gives every class an
       estimate and a standard error. Where the model was fitted (``fit_shortlist``) that says which
       classes may be the best; otherwise the lowest 2 C^0.41 are measured, and what the gradient
       missed of them says how far to trust it for the others.
    2. Classes that may be best by z(n) standard errors are measured on more probes, with the
       gradient as control variate. A class comes (again) into question when the estimates move.
    3. More probes for the gradient, or for the classes: whichever lowers the errors more by
       evaluation.

    The answer stands when no other class is left within

        z(n) = z (4 / n)^gamma,   n: units (antithetic pairs) of the class,   gamma = 1/3

    standard errors: near ties, which cost most and say least, are settled earlier than clear cases
    (but not earlier than a tenth of all images may be, ``hunt.NEAR_TIES``).
    z comes from ``min_agreement``, see ``hunt.reach``. Of up to three classes the quantile of
    Student's t at the same tail stands in its place.

    With a head (``dive-fast probe``) its first classes are measured first, as many as held
    (1 + min_agreement) / 2 of the answers when it was tried; where those are at most 8 there is no
    gradient, where they are more than the gradient would name the head is not read.

    Where the gradient says nothing (it is zero, or not finite), all classes are measured.

    Attributes:
        min_agreement: the share of answers that shall equal those of enumeration over the same
            probes. Of a fitted model it is what held on images that were left out of the fit,
            shortlist included. docs/strategies.md has measured curves.
        budget: evaluations of an image at most, 8 or more; None for no limit. The
            classes in question share what is left in as many rounds as halving them takes
            (sequential halving on common probes, arXiv 1906.04356).
        shortlist: classes that an unfitted model measures first; 2 C^0.41 if None.
        gradient_probes: probes of the gradient at most; 2 evaluations each.
        first_gradient: probes of its first part.
        final_probes: of the answer and its nearest rival, at least.
        growth: probes at a look over those at the look before.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "auto"
    min_agreement: float = 0.95
    budget: int | None = None
    shortlist: int | None = None
    gradient_probes: int = 24
    first_gradient: int = 8
    final_probes: int = 6
    growth: float = 1.5
    loss: str = "l2"
    uses_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.min_agreement < 1:
            raise DiveFastError(
                f"min_agreement must lie between 0 and 1, got {self.min_agreement}."
            )
        least = {
            "budget": LEAST_BUDGET,
            "shortlist": 1,
            "gradient_probes": 0,
            "first_gradient": 1,
            "final_probes": 1,
        }
        for key, bound in least.items():
            value = getattr(self, key)
            if value is not None and value < bound:
                raise DiveFastError(f"{key} must be at least {bound}, got {value}.")
        if not self.growth > 1:
            raise DiveFastError(f"growth must be greater than 1, got {self.growth}.")

    def search(self, task: Task) -> Search:
        return (yield from Hunt(self, task).run())
