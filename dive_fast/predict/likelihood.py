"""How likely images are under the model, by its variational bound: part of ``DiffusionClassifier``.

``core.bound`` has the equations, docs/likelihood.md what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dive_fast.core.bound import (
    bound_probes,
    density_reconstruction,
    pixel_reconstruction,
    prior_term,
    standard_error,
    step_terms,
)
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, Losses, Search
from dive_fast.data.images import as_images
from dive_fast.engine import Job
from dive_fast.errors import DiveFastError, ImageError, ModelError, shown
from dive_fast.predict.arguments import as_rows
from dive_fast.predict.predictor import Predictor

UNITS = ("nats", "bits/dim")
LEVELS = 256  # of a pixel of 8 bits


@dataclass(frozen=True)
class Likelihood:
    """The bound on log p(x | c) for B images and C conditions.

    Attributes:
        values: float64 [B, C]. In nats a lower bound of log p, so that more is likelier; in
            bits/dim an upper bound of -log2 P / D, so that less is. Estimated without bias.
        standard_errors: float64 [B, C], of ``values``, from the probes: that of the mean of
            (f_1 + f_2) / 2 over strata of the timesteps, f_1 and f_2 two independent draws in each.
            All images share the probes, so the mean over images has no smaller one on that account.
        unit: "nats" or "bits/dim".
        bound_of: what has this likelihood, in words.
        classes: rows of the vocabulary, None for the condition "no class".
        prior: float64 [B], its part of ``values``.
        diffusion: float64 [B, C], its part, the only one that is estimated.
        reconstruction: float64 [B], its part.
        draws: float64 [B, C, U], what each pair of probes alone would have as ``diffusion``.
        probes: on which it was measured.
    """

    values: torch.Tensor
    standard_errors: torch.Tensor
    unit: str
    bound_of: str
    classes: tuple[int | None, ...]
    prior: torch.Tensor
    diffusion: torch.Tensor
    reconstruction: torch.Tensor
    draws: torch.Tensor = field(repr=False)
    probes: ProbeList = field(repr=False)

    def of(self, *classes: int | None) -> Likelihood:
        """The part of some of the conditions, in the order given.

        Raises:
            DiveFastError: one of them is not among ``classes``.
        """
        if any(c not in self.classes for c in classes):
            raise DiveFastError(
                f"expected conditions among {list(self.classes)}, got {shown(list(classes))}."
            )
        at = [self.classes.index(c) for c in classes]
        columns = {name: getattr(self, name)[:, at]
                   for name in ("values", "standard_errors", "diffusion", "draws")}  # fmt: skip
        return replace(self, classes=tuple(classes), **columns)

    def score(self, other: Likelihood) -> tuple[torch.Tensor, torch.Tensor]:
        """How much likelier images are here than there: log p(x | c) - log p(x) and the like.

        Both are bounds, so their difference is none; it is what classifiers compare. On common
        probes most of the noise cancels, and the standard error says so.

        Args:
            other: of one condition, or as many, on the same images, with the same probes and seed.

        Returns:
            The difference and its standard error, nats, or bits/dim saved: float64 [B, C] each.

        Raises:
            DiveFastError: they cannot be compared.
        """
        sign = 1.0 if self.unit == "nats" else -1.0
        if not isinstance(other, Likelihood):
            raise DiveFastError(f"expected a Likelihood to compare with, got {shown(other)}.")
        alike = (
            other.unit == self.unit
            and other.bound_of == self.bound_of
            and len(other.values) == len(self.values)
            and other.values.shape[1] in (1, self.values.shape[1])
            and torch.equal(other.probes.timesteps, self.probes.timesteps)
            and torch.equal(other.probes.noise, self.probes.noise)
        )
        if not alike:
            raise DiveFastError(
                "expected a likelihood of the same images in the same unit, on the same probes and "
                f"seed, of one condition or as many, got one of {list(other.values.shape)} in "
                f"{other.unit} against {list(self.values.shape)} in {self.unit}."
            )
        difference = sign * (self.values - other.values)
        return difference, standard_error(self.draws - other.draws)


@dataclass(frozen=True)
class Bound:
    """What all images share: -log p is the loss times ``factor`` plus ``constant``, a dimension.

    Attributes:
        unit: "nats" or "bits/dim".
        probes: K, in antithetic pairs.
        factor: float64 [K / 2], of the loss of each pair.
        constant: of every dimension, in nats.
    """

    unit: str
    probes: ProbeList
    factor: torch.Tensor
    constant: float


class Likelihoods(Predictor):
    """The part of ``DiffusionClassifier`` that bounds likelihoods."""

    def log_likelihood(
        self,
        images: Any = None,
        classes: str | int | Sequence[str | int | None] | None = None,
        *,
        latents: torch.Tensor | None = None,
        unit: str = "nats",
        probes: int = 200,
        seed: int = 0,
        progress: bool = False,
    ) -> Likelihood:
        """The variational bound on log p(x | c), with its standard error.

        Costs ``probes`` evaluations for every image and condition.

        Args:
            images, latents: as in ``__call__``.
            classes: rows of the vocabulary or names, one or many; "all"; None, alone or among
                them, for the model's own condition "no class", which gives log p(x).
            unit: "nats", of the density of x0 as the model sees it; "bits/dim", of 8-bit pixels
                (cropped and resized as for ``__call__``), for models of pixels.
            probes: how many, divisible by 4, at least 8.
            seed: of the timesteps and noises.
            progress: show a bar.

        Raises:
            DiveFastError: bad input, or a unit that has no meaning for these images.
            ModelError: the model has no condition "no class", or its schedule gives no bound.
        """
        bound = self._bound(unit, probes, seed)
        chosen = self._conditions_of(classes)
        with torch.inference_mode(False):
            x0, reconstruction = self._x0(images, latents, unit)
            if len(x0) == 0:
                raise ImageError("expected at least one image, got none.")
            losses = self._pair_losses(x0, chosen, bound.probes, len(x0) if progress else None)
        return self._likelihood(bound, x0, chosen, reconstruction, losses)

    def stream_log_likelihood(
        self,
        items: Iterable[tuple[Any, Any, str | int | Sequence[str | int | None] | None]],
        *,
        unit: str = "nats",
        probes: int = 200,
        seed: int = 0,
        progress: int | None = None,
    ) -> Iterator[tuple[Any, Likelihood]]:
        """The same of images as they come, each under conditions of its own.

        Args:
            items: triples of a key, one image and its ``classes``; read lazily.
            unit, probes, seed: as in ``log_likelihood``.
            progress: the number of images if a bar shall be shown.

        Yields:
            The key and a ``Likelihood`` of one image, as they are found: the same values in any
            order and company, but for rounding.

        Raises:
            DiveFastError, ModelError: as ``log_likelihood``.
        """
        bound = self._bound(unit, probes, seed)
        under_way: dict[Any, tuple[torch.Tensor, tuple[int | None, ...], torch.Tensor]] = {}

        def jobs() -> Iterator[Job]:
            for key, image, classes in items:
                chosen = self._conditions_of(classes)
                with torch.inference_mode(False):
                    x0, reconstruction = self._x0(image, None, unit)
                    job = self._job(key, x0[0], self._search(chosen, len(bound.probes)))
                if len(x0) != 1:
                    raise DiveFastError(f"expected one image for each key, got {len(x0)}.")
                under_way[key] = (x0, chosen, reconstruction)
                yield job

        for finished in self._run(jobs(), bound.probes, progress=progress):
            x0, chosen, reconstruction = under_way.pop(finished.key)
            losses = _of_conditions(finished.answer, chosen)[None]
            yield finished.key, self._likelihood(bound, x0, chosen, reconstruction, losses)

    def likelihood_identity(self, *, unit: str, probes: int, seed: int) -> dict[str, Any]:
        """What decides the values, for JSON."""
        found = {
            "model": self._model_identity(),
            "likelihood": {"unit": unit, "probes": probes, "seed": seed},
        }
        if engine := self.options.identity():
            found["engine"] = engine
        return found

    def _bound(self, unit: Any, probes: int, seed: int) -> Bound:
        if not isinstance(unit, str) or unit not in UNITS:
            raise DiveFastError(f"expected a unit of {', '.join(UNITS)}, got {shown(unit)}.")
        schedule, shape = self.model.schedule, tuple(self.model.latent_shape)
        constant, _ = step_terms(schedule)
        probe_list, factor = bound_probes(schedule, probes, shape, seed)
        return Bound(unit, probe_list, factor, float(constant.sum()))

    def _x0(self, images: Any, latents: Any, unit: str) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 [B, C, h, w], and the reconstruction part, float64 [B], nats."""
        if unit == "bits/dim":
            return self._pixels(images, latents)
        x0 = self._latents(images, latents)
        part = math.prod(self.model.latent_shape) * density_reconstruction(self.model.schedule)
        return x0, torch.full((len(x0),), part, dtype=torch.float64)

    def _likelihood(
        self,
        bound: Bound,
        x0: torch.Tensor,
        chosen: tuple[int | None, ...],
        reconstruction: torch.Tensor,
        losses: torch.Tensor,
    ) -> Likelihood:
        """Of x0 [B, C, h, w] and the losses of every pair of probes, [B, C, K / 2]."""
        if not losses.isfinite().all():
            raise ModelError(
                f"expected finite losses from {self.model.name} in {self.model.dtype}, got NaN or "
                f"infinity: its weights, its schedule or this precision cannot be right."
            )
        dim = math.prod(self.model.latent_shape)
        # Nats of -log p in all parts; bits are fewer and count each dimension.
        scale = -1.0 if bound.unit == "nats" else 1 / (dim * math.log(2))
        draws = scale * dim * (losses * bound.factor + bound.constant)
        prior = scale * prior_term(self.model.schedule, x0.cpu())
        diffusion, reconstruction = draws.mean(dim=2), scale * reconstruction
        return Likelihood(
            values=(prior + reconstruction)[:, None] + diffusion,
            standard_errors=standard_error(draws),
            unit=bound.unit,
            bound_of=self._bound_of(bound.unit),
            classes=chosen,
            prior=prior,
            diffusion=diffusion,
            reconstruction=reconstruction,
            draws=draws,
            probes=bound.probes,
        )

    def _bound_of(self, unit: str) -> str:
        if unit == "bits/dim":
            return "the probability of the 8-bit pixels"
        latent = getattr(self.model, "vae", None) is not None
        return "the density of the latents x0" if latent else "the density of x0"

    def _conditions_of(self, classes: Any) -> tuple[int | None, ...]:
        """Rows of the vocabulary, None for the null condition."""
        vocabulary = self.model.vocabulary
        if isinstance(classes, str) and classes == "all":
            return tuple(range(len(vocabulary)))
        single = classes is None or isinstance(classes, str)
        given = [classes] if single else classes
        if not isinstance(given, list | tuple):
            return tuple(as_rows(given, len(vocabulary)).tolist())
        if any(c is None for c in given) and vocabulary.unconditional is None:
            raise ModelError(
                f"expected classes: {self.model.name} has not learned a condition that means no "
                f"class."
            )
        rows = [self._row(c) if isinstance(c, str) else c for c in given]
        if numbers := [c for c in rows if c is not None]:
            found = iter(as_rows(numbers, len(vocabulary)).tolist())
            rows = [None if c is None else next(found) for c in rows]
        if not rows:
            raise DiveFastError("expected at least one class, got none.")
        return tuple(rows)

    def _row(self, name: str) -> int:
        names = self.model.vocabulary.names
        if name not in names:
            raise DiveFastError(
                f"expected a class of {self.model.name}, 'all' or None, got {shown(name)}."
            )
        return names.index(name)

    def _pair_losses(
        self,
        x0: torch.Tensor,
        chosen: tuple[int | None, ...],
        probes: ProbeList,
        progress: int | None,
    ) -> torch.Tensor:
        """The mean loss of every pair of probes, float64 [B, C, K / 2]."""
        out = torch.empty(len(x0), len(chosen), len(probes) // 2, dtype=torch.float64)
        jobs = (self._job(i, x, self._search(chosen, len(probes))) for i, x in enumerate(x0))
        for finished in self._run(jobs, probes, progress=progress):
            out[finished.key] = _of_conditions(finished.answer, chosen)
        return out

    def _search(self, chosen: tuple[int | None, ...], k: int) -> Search:
        rows = torch.tensor([c for c in chosen if c is not None], dtype=torch.int64)
        return _measure(rows, self.model.vocabulary.unconditional if None in chosen else None, k)

    def _pixels(self, images: Any, latents: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 [B, C, h, w] of images in 8 bits, and the reconstruction part, float64 [B], nats.

        Raises:
            DiveFastError: they are none, or x0 are not pixels.
        """
        refusal = "bits/dim are those of 8-bit pixels; ask for nats"
        if (images is None) == (latents is None):
            raise DiveFastError("expected either images or latents.")
        if latents is not None:
            raise DiveFastError(f"{refusal}: expected images, got latents.")
        channels, size, _ = self.model.image_shape
        pixels = torch.stack(as_images(images, size, channels))
        # Where x0 are pixels, each is its own pixel times the channel's scale, and shifted.
        ends = torch.ones(2, *pixels.shape[1:]) * torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
        low, high = self.encode_pixels(ends).cpu()
        alike = low.shape == pixels.shape[1:]
        x0 = self.encode_pixels(pixels).cpu() if alike else pixels
        expected = (low + high) / 2 + (high - low) / 2 * pixels if alike else x0
        if not alike or not torch.allclose(x0, expected, rtol=1e-3, atol=1e-3):
            raise DiveFastError(
                f"{refusal}: expected a model of pixels, got {self.model.name}, whose x0 are not."
            )
        # ``as_images`` gives every image in 8 bits, also those that it resized.
        at_end = (pixels.abs() > 1 - 1 / (LEVELS - 1)).double().sum(dim=(2, 3))
        total = torch.zeros(len(x0), dtype=torch.float64)
        count = pixels[0, 0].numel()
        for c, scale in enumerate(((high - low) / 2).abs().mean(dim=(1, 2)).tolist()):
            within, end = pixel_reconstruction(self.model.schedule, scale * 2 / (LEVELS - 1))
            total += (count - at_end[:, c]) * within + at_end[:, c] * end
        return x0, total


def _of_conditions(answer: Answer, chosen: tuple[int | None, ...]) -> torch.Tensor:
    """The mean loss of every pair of probes, float64 [C, K / 2]."""
    found = answer.trace
    k = next(iter(found.values())).shape[-1]
    is_null = torch.tensor([c is None for c in chosen])
    out = torch.empty(len(chosen), k, dtype=torch.float64)
    if "classes" in found:
        out[~is_null] = found["classes"].double()
    if "null" in found:
        out[is_null] = found["null"].double()
    return out.unflatten(1, (-1, 2)).mean(dim=2)


def _measure(rows: torch.Tensor, null: torch.Tensor | None, k: int) -> Search:
    """Losses of classes [n, k] and of the null condition [1, k], where they are asked for."""
    every, found = torch.arange(k), {}
    if len(rows):
        found["classes"] = yield Losses(rows, every)
    if null is not None:
        found["null"] = yield Losses(null[None], every)
    nothing = torch.empty(0)
    return Answer(0, nothing, nothing, found)
