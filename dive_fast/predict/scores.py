"""What an ``ImageTextScorer`` answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from dive_fast.errors import DiveFastError


@dataclass(frozen=True)
class Scores:
    """How well each of T texts explains each of B images; docs/scores.md says what that means.

    Attributes:
        losses: float32 [B, T], the mean loss over the probes; lower is better. Texts of one image
            can be compared, images under one text cannot (see ``lift``).
        standard_errors: float32 [B, T], of ``losses``, from the probes as if they were drawn
            independently; NaN from a single unit of them. All texts share the probes, so that most
            of it cancels in differences: see ``gaps``.
        log_posterior: float32 [B, T], log p(text | x0) among these texts, all alike beforehand.
        texts: the T texts.
        beta: inverse temperature of the posterior.
        unconditional: float32 [B], the loss under no condition; None where it was not asked for.
        n_probes: behind each loss.
        evaluations: of the network for all of it.
        seconds: in the network.
        draws: float32 [B, T, U], the mean loss on each unit (antithetic pair) of the probes.
    """

    losses: torch.Tensor
    standard_errors: torch.Tensor
    log_posterior: torch.Tensor
    texts: tuple[str, ...]
    beta: float
    unconditional: torch.Tensor | None
    n_probes: int
    evaluations: int
    seconds: float
    draws: torch.Tensor = field(repr=False)

    @property
    def best(self) -> torch.Tensor:
        """int64 [B], the text of the lowest loss for each image; ties go to the first."""
        return self.losses.argmin(dim=1)

    def gaps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much each text is worse than the image's best, and the standard error of that.

        Returns:
            float32 [B, T] each; both are 0 for the best.
        """
        rows = torch.arange(len(self.losses))
        best = self.best
        differences = self.draws - self.draws[rows, best][:, None]
        return self.losses - self.losses[rows, best][:, None], standard_error(differences)

    def lift(self) -> torch.Tensor:
        """beta (L(x0, no condition) - L(x0, text)), float32 [B, T]: what a text adds, in nats.

        Unlike the losses it can be compared between images.

        Raises:
            DiveFastError: the loss under no condition was not measured.
        """
        return _lift(self.unconditional, self.losses, self.beta)


@dataclass(frozen=True)
class PairScores:
    """How well each of B texts explains its image: the fields of ``Scores``, [B] and [B, U]."""

    losses: torch.Tensor
    standard_errors: torch.Tensor
    texts: tuple[str, ...]
    beta: float
    unconditional: torch.Tensor | None
    n_probes: int
    evaluations: int
    seconds: float
    draws: torch.Tensor = field(repr=False)

    def lift(self) -> torch.Tensor:
        """beta (L(x0, no condition) - L(x0, text)), float32 [B]; see ``Scores.lift``.

        Raises:
            DiveFastError: the loss under no condition was not measured.
        """
        return _lift(self.unconditional, self.losses, self.beta)


@dataclass(frozen=True)
class Retrieval:
    """The texts of images and the images of texts.

    Attributes:
        scores: that both are read off.
        relevance: float32 [B, T], what texts and images are ranked by, higher is better: the
            ``lift`` or, with the baseline "mean", beta (mean over the texts of L - L). Within an
            image both rank the texts as the losses do.
        baseline: "unconditional" or "mean".
    """

    scores: Scores
    relevance: torch.Tensor
    baseline: str

    @property
    def text_of_image(self) -> torch.Tensor:
        """int64 [B], the best text of each image; ties go to the first."""
        return self.relevance.argmax(dim=1)

    @property
    def image_of_text(self) -> torch.Tensor:
        """int64 [T], the best image of each text; ties go to the first."""
        return self.relevance.argmax(dim=0)

    def texts(self) -> torch.Tensor:
        """int64 [B, T], all texts of each image, the best first."""
        return self.relevance.argsort(dim=1, descending=True, stable=True)

    def images(self) -> torch.Tensor:
        """int64 [T, B], all images of each text, the best first."""
        return self.relevance.argsort(dim=0, descending=True, stable=True).T


@dataclass(frozen=True)
class Choice:
    """Which of its own C candidates explains an image best.

    Attributes:
        index: of the answer among the candidates.
        text: the answer.
        texts: the candidates, in the order in which they were given.
        losses: float32 [C], mean loss of each, NaN where it was not measured; a candidate that was
            given up early has the answer's loss plus their mean difference on the same probes.
        n_probes: int64 [C], how many probes stand behind each.
        log_posterior: float32 [C], log p(text | x0) among the candidates; -inf where not measured.
        margin: log-odds of the answer over the most probable other candidate, in nats; infinite
            where no other was measured.
        evaluations: forwards plus backwards of the network that this item took.
        seconds: this item's share of the time.
    """

    index: int
    text: str
    texts: tuple[str, ...]
    losses: torch.Tensor
    n_probes: torch.Tensor
    log_posterior: torch.Tensor
    margin: float
    evaluations: int
    seconds: float

    @property
    def probability(self) -> float:
        """p(text | x0) of the answer among the candidates."""
        return math.exp(self.log_posterior[self.index].item())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; null stands for what was not measured."""
        return {
            "choice": self.index,
            "text": self.text,
            "margin": _finite(self.margin),
            "probability": self.probability,
            "candidates": list(self.texts),
            "candidate_losses": [_finite(x) for x in self.losses.tolist()],
            "candidate_log_posterior": [_finite(x) for x in self.log_posterior.tolist()],
            "candidate_probes": self.n_probes.tolist(),
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }


def standard_error(draws: torch.Tensor) -> torch.Tensor:
    """Of the mean over the last dimension, U independent draws; NaN for a single one."""
    if draws.shape[-1] < 2:
        return torch.full(draws.shape[:-1], math.nan)
    return draws.double().std(dim=-1).div(math.sqrt(draws.shape[-1])).float()


def margin(log_posterior: torch.Tensor, index: int) -> float:
    """Log-odds of the answer over the most probable other candidate."""
    others = torch.cat([log_posterior[:index], log_posterior[index + 1 :]])
    return (log_posterior[index] - others.max()).item()


def _lift(unconditional: torch.Tensor | None, losses: torch.Tensor, beta: float) -> torch.Tensor:
    if unconditional is None:
        raise DiveFastError(
            "expected scores with the loss under no condition: ask for unconditional=True."
        )
    base = unconditional.view(-1, *[1] * (losses.ndim - 1))
    return (beta * (base.double() - losses.double())).float()


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
