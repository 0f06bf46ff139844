"""Images on some classes each, all probes of all of them, and the likelihood under one class.

    L(y; x0)               of the classes y that an image names, on probes that all images share
    bound on log p(x0 | y)    of one of them, on probes of its own (``core.bound``)

Both in one search, so that an image is finished when its answer comes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Losses, Search
from dive_fast.predict.arguments import as_latents
from dive_fast.predict.classification import Classification
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.predict.likelihood import Bound
from dive_fast.strategies.base import Ledger


class Item(NamedTuple):
    """An image that is measured.

    Attributes:
        key: of its answer.
        x0: float [C, h, w].
        classes: int64 [n], rows of the vocabulary, each once.
        of: the row whose likelihood is wanted.
    """

    key: Hashable
    x0: torch.Tensor
    classes: torch.Tensor
    of: int


class Measured(NamedTuple):
    """What is known of an image.

    Attributes:
        answer: the class of the lowest loss, and the losses of those that were measured.
        log_likelihood: a lower bound of log p(x0 | ``Item.of``), in nats, estimated without bias;
            None if it was not asked for.
        log_likelihood_error: its standard error, from the probes.
    """

    answer: Classification
    log_likelihood: float | None = None
    log_likelihood_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A record as ``Classification.to_dict``, with the likelihood where there is one."""
        found = self.answer.to_dict()
        if self.log_likelihood is not None:
            found["log_likelihood"] = self.log_likelihood
            found["log_likelihood_error"] = self.log_likelihood_error
        return found


def bound_in_nats(classifier: DiffusionClassifier, probes: int, seed: int) -> Bound:
    """The bound on log p(x0 | y) of ``DiffusionClassifier.log_likelihood``, for ``measure``.

    Args:
        probes: how many, divisible by 4, at least 8.
        seed: of timesteps and noises.

    Raises:
        DiveFastError: the number of probes.
        ModelError: the schedule gives no bound.
    """
    return classifier._bound("nats", probes, seed)


def measure(
    classifier: DiffusionClassifier,
    items: Iterable[Item],
    probes: ProbeList,
    bound: Bound | None = None,
) -> Iterator[tuple[Hashable, Measured]]:
    """Measures images as they come and yields (key, what was found) as they are finished.

    Costs an image ``len(classes)`` times ``len(probes)`` evaluations, and those of the bound.

    Args:
        items: read lazily.
        probes: of the classes, the same for all images.

    Raises:
        ImageError: x0 of another shape, or not finite.
        ModelError: the model gives NaN or infinity.
    """
    k = len(probes)
    every = probes if bound is None else _joined(probes, bound.probes)
    shape, n_classes = classifier.model.latent_shape, len(classifier.names)
    under_way: dict[Hashable, tuple[torch.Tensor, int]] = {}

    def jobs() -> Iterator[Any]:
        for item in items:
            x0 = as_latents(item.x0, shape, batch=False)
            if bound is not None:
                under_way[item.key] = x0[None], item.of
            search = _search(item.classes, item.of, n_classes, k, len(every))
            yield classifier._job(item.key, x0, search)

    for finished in classifier._run(jobs(), every):
        answer = classifier._classification(finished, classifier._beta(None), None, False)
        if bound is None:
            yield finished.key, Measured(answer)
        else:
            x0, of = under_way.pop(finished.key)
            losses = finished.answer.trace["of_bound"].double().view(1, 1, -1, 2).mean(dim=3)
            rest = classifier._x0(None, x0, bound.unit)[1]
            found = classifier._likelihood(bound, x0, (of,), rest, losses)
            yield finished.key, Measured(answer, found.values.item(), found.standard_errors.item())


def _joined(probes: ProbeList, bound: ProbeList) -> ProbeList:
    """One list of both; of neither are the pairs looked at."""
    return ProbeList(
        torch.cat([probes.timesteps, bound.timesteps]),
        torch.cat([probes.noise[probes.noise_index], bound.noise[bound.noise_index]]),
    )


def _search(classes: torch.Tensor, of: int, n_classes: int, k: int, every: int) -> Search:
    # Sorted: of equal losses the lowest row wins, as everywhere.
    rows, ids = classes.sort().values, torch.arange(k)
    ledger = Ledger(n_classes, k)
    ledger.add(rows, ids, (yield Losses(rows, ids)))
    best = int(rows[ledger.means()[rows].argmin()])
    if every == k:
        return ledger.answer(best)
    losses = yield Losses(torch.tensor([of]), torch.arange(k, every))
    return ledger.answer(best, of_bound=losses[0])
