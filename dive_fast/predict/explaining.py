"""Maps of where a class explains a picture, and better than another: part of the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.numbers import whole_seed
from dive_fast.core.probes import ProbeList, low_discrepancy_probes
from dive_fast.core.requests import Answer, Losses, Search
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.data.images import as_images
from dive_fast.errors import DiveFastError, ModelError, shown, some
from dive_fast.models.protocol import Model, optional
from dive_fast.predict.arguments import as_probes, as_rows
from dive_fast.predict.classification import Classification
from dive_fast.predict.explanation import Explanation, as_picture, grouped_maps, groups_of
from dive_fast.predict.predictor import Predictor
from dive_fast.strategies import Strategy, resolve_strategy
from dive_fast.strategies.base import DEFAULT_PROBES

# A class by its name or its row.
ClassName = str | int


class NoOtherClass(DiveFastError):
    """A picture whose answer there is nothing to compare with."""


class Explaining(Predictor):
    """The part of ``DiffusionClassifier`` that says where classes explain pictures."""

    def explain(
        self,
        images: Any = None,
        a: ClassName | Sequence[ClassName] | None = None,
        b: ClassName | Sequence[ClassName] | None = None,
        *,
        latents: torch.Tensor | None = None,
        strategy: str | Strategy | None = None,
        probes: int | ProbeList | None = 64,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        progress: bool = False,
    ) -> list[Explanation]:
        """Where class a explains each picture better than b; docs/explain.md has the formulas.

        Args:
            images, latents: as in ``__call__``.
            a: a class by name or row, or one for every image in a list; the answer if None.
            b: what a is compared with, given likewise; the runner-up if None: the most probable
                measured class beside a.
            strategy: of the search for an answer or a runner-up, which has its own number of
                probes; its loss and its list of probes are those of the map.
            probes: of the map, how many, or a list of your own; the strategy's choice if None. What
                is behind the last whole antithetic pair is left out.
            seed: of the probes' noise, and of the search.
            timesteps, weights: as in ``__call__``; the map weighs the timesteps as the answer does.
            progress: show a bar.

        Returns:
            One ``Explanation`` per image. A map costs two evaluations a probe (times the prompts of
            a class under ``average="loss"``).

        Raises:
            DiveFastError: bad input, an unknown class, or two that the model cannot tell apart.
            ModelError: a layout-to-image model, or one that fails.
            NoOtherClass: an image whose answer is b, or of which only one class was measured.
        """
        check_classes(self.model)
        chosen = resolve_strategy(strategy, None, {})
        probe_list = self.probe_list(chosen, probes, seed, timesteps, weights)
        placed = {"timesteps": timesteps, "weights": weights}
        with torch.inference_mode(False):
            x0, pictures = self._with_pictures(images, latents)
            n, vocabulary = len(x0), self.model.vocabulary
            first, second = (as_classes(x, n, vocabulary.names) for x in (a, b))
            for pair in set(zip(first, second, strict=True)):
                if None not in pair:
                    check_pair(*pair, vocabulary)
            asked = [i for i in range(n) if None in (first[i], second[i])]
            if asked:
                answers = self(latents=x0[asked], strategy=chosen, seed=seed, **placed)
                for i, found in zip(asked, answers, strict=True):
                    first[i], second[i] = completed(found, first[i], second[i], vocabulary)
            groups = groups_of(probe_list)
            jobs = (
                self._job(i, x0[i], _answered(grouped_maps(torch.tensor(pair), groups)))
                for i, pair in enumerate(zip(first, second, strict=True))
            )
            out: list[Any] = [None] * n
            for done in self._run(jobs, probe_list, chosen.loss, n if progress else None):
                maps, i = done.answer.trace["maps"], done.key
                out[i] = Explanation(
                    groups=maps[:, 1] - maps[:, 0],
                    sizes=tuple(map(len, groups)),
                    a=vocabulary.names[first[i]],
                    b=vocabulary.names[second[i]],
                    evaluations=done.evaluations,
                    picture=pictures[i],
                )
        return out

    def losses(
        self,
        images: Any = None,
        classes: Sequence[int] | None = None,
        probes: int | ProbeList | None = None,
        *,
        latents: torch.Tensor | None = None,
        seed: int = 0,
        loss: str = "l2",
        progress: bool = False,
    ) -> torch.Tensor:
        """The raw loss matrix, for people who write their own rule; learned weights take no part.

        Args:
            images, latents: as in ``__call__``.
            classes: which classes, all if None.
            probes: how many (100 if None), or a list of your own.
            loss: "l2", "l1" or "huber".

        Returns:
            float32 [B, C, K]: loss of image b under class c on probe k.
        """
        x0 = self._latents(images, latents)
        n_classes = len(self.model.vocabulary)
        picked = torch.arange(n_classes) if classes is None else as_rows(classes, n_classes)
        probes = self._even_probes(probes, seed)
        out = torch.empty(len(x0), len(picked), len(probes))
        jobs = (self._job(i, x, _measure(picked, len(probes))) for i, x in enumerate(x0))
        for finished in self._run(jobs, probes, loss, len(x0) if progress else None):
            out[finished.key] = finished.answer.trace["losses"]
        return out

    def error_maps(
        self,
        images: Any = None,
        classes: Sequence[int] | None = None,
        probes: int | ProbeList | None = None,
        *,
        latents: torch.Tensor | None = None,
        seed: int = 0,
        loss: str = "l2",
        progress: bool = False,
    ) -> torch.Tensor:
        """The loss of each class before its mean over the pixels, for maps of your own.

        All timesteps count alike, also where the model has learned weights.

        Args:
            images, classes, probes, latents, seed, loss: as in ``losses``.

        Returns:
            float32 [B, C, h, w] in the model's own space, the mean over the probes; its mean over
            h and w is the mean of ``losses`` over K.
        """
        check_classes(self.model)
        x0 = self._latents(images, latents)
        n_classes = len(self.model.vocabulary)
        picked = torch.arange(n_classes) if classes is None else as_rows(classes, n_classes)
        probe_list = self._even_probes(probes, seed)
        everything = [torch.arange(len(probe_list))]
        jobs = (
            self._job(i, x, _answered(grouped_maps(picked, everything))) for i, x in enumerate(x0)
        )
        out = torch.empty(len(x0), len(picked), *self.model.latent_shape[1:])
        for done in self._run(jobs, probe_list, loss, len(x0) if progress else None):
            out[done.key] = done.answer.trace["maps"][0]
        return out

    def _even_probes(self, probes: int | ProbeList | None, seed: int) -> ProbeList:
        """So many (100 if None) at even timesteps, or a list of the caller's own."""
        probes, seed = as_probes(probes), whole_seed(seed)
        if isinstance(probes, ProbeList):
            return probes
        k, n_timesteps = DEFAULT_PROBES if probes is None else probes, len(self.model.schedule)
        return low_discrepancy_probes(k, n_timesteps, self.model.latent_shape, seed)

    def _with_pictures(
        self, images: Any, latents: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Any]]:
        """x0 [B, C, h, w], and the pictures as the model sees them; None of latents."""
        if images is None or latents is not None:
            x0 = self._latents(images, latents)
            return x0, [None] * len(x0)
        channels, size, _ = self.model.image_shape
        pixels = torch.stack(as_images(images, size, channels))
        return self.encode_pixels(pixels), [as_picture(image) for image in pixels]


def class_row(value: Any, names: Sequence[str]) -> int:
    """The row of a class that is named, or given as its row.

    Raises:
        DiveFastError: there is none.
    """
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < len(names):
        return int(value)
    raise DiveFastError(
        f"expected a class of {some(names)}, or a row in [0, {len(names)}), got {shown(value)}."
    )


def as_classes(given: Any, n: int, names: Sequence[str]) -> list[int | None]:
    """The row of every image's class; None where it is to be found.

    Raises:
        DiveFastError: an unknown class, or a list of another length.
    """
    if given is None:
        return [None] * n
    if not isinstance(given, list | tuple):
        return [class_row(given, names)] * n
    if len(given) != n:
        raise DiveFastError(f"expected a class for each of {n} images, got {len(given)}.")
    return [class_row(value, names) for value in given]


def check_pair(a: int, b: int, vocabulary: Vocabulary) -> None:
    """That the model can tell two classes apart.

    Raises:
        DiveFastError: they are one, or have the same embedding.
    """
    names = vocabulary.names
    if a == b:
        raise DiveFastError(f"expected two classes to compare, got {names[a]!r} twice.")
    if torch.equal(vocabulary.table[a], vocabulary.table[b]):
        raise DiveFastError(
            f"expected two classes that the model tells apart, got {names[a]!r} and {names[b]!r} "
            "of the same embedding."
        )


def completed(
    found: Classification, a: int | None, b: int | None, vocabulary: Vocabulary
) -> tuple[int, int]:
    """The rows of a and b, where what was not given is taken from an answer.

    Raises:
        NoOtherClass: there is nothing to compare.
    """
    a = found.index if a is None else a
    if b is None:
        return a, runner_up(found, vocabulary, a)
    if a == b or torch.equal(vocabulary.table[a], vocabulary.table[b]):
        raise NoOtherClass(f"the answer is {vocabulary.names[b]!r} itself: compare with another.")
    return a, b


def runner_up(found: Classification, vocabulary: Vocabulary, a: int | None = None) -> int:
    """The most probable measured class that is not a (the answer if None), nor embedded like it.

    Raises:
        NoOtherClass: there is none.
    """
    own = found.index if a is None else a
    for entry in found.top(len(vocabulary)):
        row = entry["index"]
        if row != own and not torch.equal(vocabulary.table[row], vocabulary.table[own]):
            return row
    raise NoOtherClass("only one class was measured, and there is none to compare it with.")


def check_classes(model: Model) -> None:
    """That its answers are classes.

    Raises:
        ModelError: they are layouts.
    """
    if optional(model, "layout_format") is not None:
        raise ModelError(
            f"expected a model of classes, got the layout-to-image model {model.name}: "
            "its answers have boxes."
        )


def _answered(search: Search) -> Search:
    """As a whole search: the maps are in the answer's trace."""
    maps = yield from search
    nothing = torch.empty(0)
    return Answer(0, nothing, nothing, {"maps": maps})


def _measure(classes: torch.Tensor, k: int) -> Search:
    losses = yield Losses(classes, torch.arange(k))
    means, count = losses.mean(dim=1), torch.full((len(classes),), k)
    return Answer(int(means.argmin()), means, count, {"losses": losses})
