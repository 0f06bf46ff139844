"""What the network's blocks say of images: part of ``DiffusionClassifier``."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch

from dive_fast.core.numbers import whole, whole_seed
from dive_fast.core.probes import MOST_PROBES, ProbeList
from dive_fast.core.requests import Answer, Features, Search
from dive_fast.errors import DiveFastError, ImageError, ModelError, shown
from dive_fast.models.layers import find_layer, layer_names
from dive_fast.predict.predictor import Predictor


class FeatureExtractor(Predictor):
    """The part of ``DiffusionClassifier`` that gives activations instead of answers."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the network's blocks, from the first to the last.

        Raises:
            ModelError: a model of one's own that does not state its network.
        """
        return layer_names(self.model)

    def features(
        self,
        images: Any = None,
        *,
        latents: torch.Tensor | None = None,
        layer: str | int | None = None,
        timestep: int | None = None,
        pool: str | None = "mean",
        condition: str | int = "mean",
        seed: int = 0,
        noises: int = 1,
        progress: bool = False,
    ) -> torch.Tensor:
        """What a block of the network makes of noised images; docs/features.md has the formulas.

        Args:
            images, latents: as in ``__call__``.
            layer: a name of ``layers``, an index into them (negative from the end), or another
                module of the network in dots; the middle one if None.
            timestep: t of x_t = a_t x0 + s_t eps, in [0, T); ``default_timestep`` if None.
            pool: over the positions, "mean", "attention" (weights softmax(z_i . mean / sqrt(D))) or
                None for none.
            condition: what the network is told: "mean", the mean of the vocabulary; "null", no
                condition; or the index of a class.
            seed: of the noises, which all images share.
            noises: how many the activations are averaged over, one evaluation each.
            progress: show a bar.

        Returns:
            float32 [B, D] on the CPU; without a pool [B, D, h, w] or [B, tokens, D], as the block
            gives them.

        Raises:
            DiveFastError: bad input; of a layer that is none it says what there is.
            ModelError: the model has no row for "null", or the layer gives no activations.
        """
        layer = len(self.layers) // 2 if layer is None else layer
        probes = self._noises(timestep, noises, seed)
        request = Features(self._told(condition), torch.arange(len(probes)), layer, pool)
        find_layer(self.model, request.layer)
        x0 = self._latents(images, latents)
        if len(x0) == 0:
            raise ImageError("expected at least one image, got none.")
        jobs = (self._job(i, x, _ask(request)) for i, x in enumerate(x0))
        total = len(x0) if progress else None
        found = {f.key: f.answer.trace["features"] for f in self._run(jobs, probes, progress=total)}
        return torch.stack([found[i] for i in range(len(x0))])

    def _noises(self, timestep: int | None, noises: int, seed: int) -> ProbeList:
        """One timestep with so many noises."""
        n_timesteps, shape = len(self.model.schedule), self.model.latent_shape
        if timestep is None:
            timestep = default_timestep(n_timesteps)
        timestep = whole("timestep", timestep, 0, n_timesteps - 1)
        generator = torch.Generator().manual_seed(whole_seed(seed))
        n = whole("noises", noises, 1, MOST_PROBES)
        noise = [torch.randn(shape, generator=generator) for _ in range(n)]
        return ProbeList(torch.full((len(noise),), timestep), torch.stack(noise))

    def _told(self, condition: str | int) -> torch.Tensor:
        """One condition of a request: int64 [1], or float32 [1, D]."""
        vocabulary = self.model.vocabulary
        if isinstance(condition, Integral) and not isinstance(condition, bool):
            return torch.tensor([whole("condition", condition, 0, len(vocabulary) - 1)])
        known = {"mean": vocabulary.mean, "null": lambda: vocabulary.unconditional}
        if not isinstance(condition, str) or condition not in known:
            raise DiveFastError(
                f"expected a condition 'mean', 'null' or the index of a class, got "
                f"{shown(condition)}."
            )
        row = known[condition]()
        if row is None:
            raise ModelError(
                f"expected a model that has learned what no condition is for 'null', got "
                f"{self.model.name}, which has not."
            )
        return row[None]


def default_timestep(n_timesteps: int) -> int:
    """t where features are taken unless said: T / 10, of little noise."""
    return n_timesteps // 10


def _ask(request: Features) -> Search:
    (found,) = yield request
    nothing = torch.empty(0)
    return Answer(0, nothing, nothing, {"features": found.mean(dim=0)})
