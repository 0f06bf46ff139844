"""What a classifier answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from dive_fast.core.distinct import without_row
from dive_fast.core.numbers import whole
from dive_fast.core.requests import Answer
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import DiveFastError


@dataclass(frozen=True)
class Classification:
    """The answer for one image.

    Attributes:
        label: name of the best class.
        index: its row in the vocabulary.
        log_posterior: float32 [C], log p(y | x0), normalised; -inf where nothing was measured.
        losses: float32 [C], mean noise-prediction loss of each class, NaN where not measured.
        n_probes: int64 [C], how many probes stand behind each class.
        eliminated: bool [C], classes given up before all was measured. Their log-posterior is an
            estimate on fewer probes than the answer's; what is certain is the bound.
        log_odds_bound: float32 [C], for eliminated classes: with the strategy's confidence
            log p(y | x0) - log p(answer | x0) is at most this. NaN elsewhere.
        names: the classes' names.
        evaluations: forwards plus backwards of the network that this image took.
        seconds: this image's share of the time, the packing of many images taken into account.
        trace: what the strategy saw, if asked for.
    """

    label: str
    index: int
    log_posterior: torch.Tensor
    losses: torch.Tensor
    n_probes: torch.Tensor
    eliminated: torch.Tensor
    log_odds_bound: torch.Tensor
    names: tuple[str, ...]
    evaluations: int
    seconds: float
    trace: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        c = len(self.names)
        for name in ("log_posterior", "losses", "n_probes", "eliminated", "log_odds_bound"):
            shape = list(getattr(self, name).shape)
            if shape != [c]:
                raise DiveFastError(f"{name} must have shape [{c}], got {shape}.")
        if not 0 <= self.index < c:
            raise DiveFastError(f"index must lie in [0, {c}), got {self.index}.")

    @property
    def probability(self) -> float:
        """p(y | x0) of the answer."""
        return math.exp(self.log_posterior[self.index].item())

    def top(self, k: int = 5) -> list[dict[str, Any]]:
        """The best k measured classes, as the transformers pipelines give them.

        Returns:
            ``[{"label": ..., "index": ..., "score": ...}, ...]``, the answer first; ``index`` is
            the class's row in the vocabulary.

        Raises:
            DiveFastError: k is no whole number of at least 0.
        """
        k = whole("top", k, 0)
        order = self.log_posterior.argsort(descending=True, stable=True).tolist()
        # A strategy's answer need not be the class of the lowest mean it happened to see.
        order = [self.index, *(i for i in order if i != self.index)]
        return [
            {"label": self.names[i], "index": i, "score": math.exp(self.log_posterior[i].item())}
            for i in order[:k]
            if self.n_probes[i] > 0 or i == self.index
        ]

    def to_dict(self, top: int = 5) -> dict[str, Any]:
        """Plain numbers for JSON, as docs/records.md lists them.

        null stands for what was not measured or has no bound; ``eliminated`` lists rows.

        Args:
            top: how many classes ``"top"`` lists.
        """
        return {
            "label": self.label,
            "index": self.index,
            "probability": self.probability,
            "top": self.top(top),
            "log_posterior": [_finite(x) for x in self.log_posterior.tolist()],
            "losses": [_finite(x) for x in self.losses.tolist()],
            "n_probes": self.n_probes.tolist(),
            "eliminated": self.eliminated.nonzero()[:, 0].tolist(),
            "log_odds_bound": [_finite(x) for x in self.log_odds_bound.tolist()],
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }


def lowest_twin(answer: Answer, index: int, vocabulary: Vocabulary) -> int:
    """The lowest row of the same name and embedding as ``index``, measured on as many probes.

    Their losses are the same but for rounding, which must not decide between them.
    """
    names, table = vocabulary.names, vocabulary.table
    plain = without_row(names[index], index)
    if plain == names[index]:  # no other class was called so
        return index
    for row in range(index):
        if without_row(names[row], row) == plain and answer.n_probes[row] == answer.n_probes[index]:
            if torch.equal(table[row], table[index]):
                return row
    return index


def log_posterior(
    answer: Answer, beta: float, log_prior: torch.Tensor | None = None
) -> torch.Tensor:
    """log p(y | x0) = -beta L(y; x0) + log p(y) + const, float32 [C]; -inf if never measured.

    beta does not grow with the number of probes: more of them measure the same L more exactly,
    they are no further evidence on y.
    """
    energy = -beta * answer.losses.double()
    if log_prior is not None:
        energy = energy + log_prior.double()
    energy = torch.where(answer.n_probes > 0, energy, -math.inf)
    return energy.log_softmax(dim=0).float()


def log_odds_bound(
    answer: Answer, index: int, beta: float, log_prior: torch.Tensor | None = None
) -> torch.Tensor:
    """Upper bounds on log p(y | x0) - log p(index | x0) of eliminated classes, float32 [C].

    log p(y) - log p(index) - beta (bound_y + L(answer) - L(index)), NaN where there is no bound.
    """
    if answer.bound is None:
        return torch.full_like(answer.losses, math.nan)
    losses = answer.losses.double()
    odds = -beta * (answer.bound.double() + losses[answer.index] - losses[index])
    if log_prior is not None:
        odds = odds + log_prior.double() - log_prior[index].double()
    return odds.float()


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
