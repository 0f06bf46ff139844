"""How ``fit_shortlist`` comes by its images' losses, and what it makes of them."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from dive_fast.core.loss_weights import LossWeights, digest_of
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, Gradients, Losses, Search
from dive_fast.core.shortlist import Check, Shortlist, Survey, digest, estimate_shortlist
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.predict.checking import Measured, checks
from dive_fast.predict.predictor import Predictor
from dive_fast.strategies import Auto
from dive_fast.strategies.base import DEFAULT_PROBES
from dive_fast.strategies.evidence import by_unit

# Classes that go on to all probes.
FINALISTS = 16
# An agreement that every fit is compared at.
USUAL = 0.95

log = logging.getLogger(__name__)


def surveyed_shortlist(
    classifier: Predictor,
    x0: torch.Tensor,
    k: int,
    seed: int,
    progress: bool,
    weights: str | LossWeights | None = None,
) -> tuple[Shortlist, bool]:
    """A shortlist with its checks, and whether ``auto`` does better with it than without.

    Args:
        x0: float32 [B, C, h, w], B >= 2.
        k: probes that every class is measured on.
        weights: of the losses, as in ``Predictor.learned_weights``.
    """
    model = classifier.model
    most = max(k, DEFAULT_PROBES)
    counts = classifier.learned_weights(Auto(), most, weights)
    probes = classifier.probe_list(Auto(), most, seed, weights=weights)
    found = measured(classifier, x0, probes, k // probes.unit * probes.unit, progress)
    shortlist, without = estimate_shortlist(survey_of(found), digest(model.vocabulary.names))
    with_it = checks(found, without, probes)
    shortlist = replace(shortlist, checks=with_it, weights=digest_of(counts))
    plain = checks(found, [None] * len(found), probes)
    better = _cost(with_it) < _cost(plain)
    if not better:
        log.warning(
            "the shortlist is left out: on images left out auto needs %.0f evaluations with it "
            "and %.0f without, for an agreement of %g.",
            _cost(with_it),
            _cost(plain),
            USUAL,
        )
    return shortlist, better


def _cost(found: tuple[Check, ...]) -> float:
    """Evaluations for the usual agreement; infinite where no level keeps it."""
    return next((x.evaluations for x in found if x.keeps(USUAL)), float("inf"))


def survey_of(images: list[Measured]) -> Survey:
    """What a shortlist is estimated from: the probes that every class was measured on."""
    unit = len(images[0].base) // images[0].slopes.shape[1]

    def units(losses: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(by_unit(losses.double().numpy(), unit))

    return Survey(
        torch.stack([units(x.losses[:, : len(x.base)]) for x in images]),
        torch.stack([units(x.base[None])[0] for x in images]),
        torch.stack([x.slopes for x in images]),
    )


def measured(
    classifier: Predictor, x0: torch.Tensor, probes: ProbeList, k: int, progress: bool = False
) -> list[Measured]:
    """Every class of every image on k probes, a multiple of their unit, the best 16 on all."""
    vocabulary = classifier.model.vocabulary
    search = (_survey(vocabulary, probes, k) for _ in x0)
    jobs = (classifier._job(i, x, s) for i, (x, s) in enumerate(zip(x0, search, strict=True)))
    found = [None] * len(x0)
    for finished in classifier._run(jobs, probes, progress=len(x0) if progress else None):
        found[finished.key] = Measured(**finished.answer.trace)
    return found


def _survey(vocabulary: Vocabulary, probes: ProbeList, k: int) -> Search:
    """All classes on k probes, the best on all; the gradient at the mean: a ``Measured``."""
    n, v0, first = len(vocabulary), vocabulary.mean(), torch.arange(k)
    reply = yield Gradients(v0[None], first, per=probes.unit)
    slopes = torch.stack([vocabulary.linear(v0, g) for g in reply.gradients[:, 0]], dim=1)
    losses = yield Losses(torch.arange(n), first)
    means = losses.mean(dim=1)
    # Those far behind keep their mean: no search asks for them so far.
    every = torch.cat([losses, means[:, None].expand(-1, len(probes) - k)], dim=1)
    if k < len(probes):
        best, rest = means.argsort()[:FINALISTS], torch.arange(k, len(probes))
        every[best, k:] = yield Losses(best, rest)
    trace = {"losses": every, "base": reply.losses[0], "slopes": slopes}
    return Answer(int(means.argmin()), means, torch.full((n,), k), trace)
