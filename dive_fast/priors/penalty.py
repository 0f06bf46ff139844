"""What a prior adds to the objective of a search for layouts.

    L(v; x0) + lambda mean_k l(v; t_k, eps_k)

over K fixed probes (t_k, eps_k), the same for all images and all layouts. Source: DIVE (arXiv
2504.17253).

All objects of a layout meet the same noise. Objects have no order, so a layout has one penalty in
whichever slots they stand, and what stays when an object is added, removed, moved or renamed is
compared under equal noise. Each object alone sees noise of the distribution that the prior was
trained on; that the others' is equal it never saw in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dive_fast.errors import ModelError
from dive_fast.layouts import LayoutFormat
from dive_fast.models.checkpoint import fingerprint
from dive_fast.priors.layout_prior import CROP_SLOTS, LayoutPrior
from dive_fast.probes import van_der_corput
from dive_fast.projection import SLOTS_PER_OBJECT

ROWS = 2048  # (layout, probe) rows of one forward without gradient, at most


class LayoutPenalty:
    """lambda times the prior's loss of layouts.

    Args:
        prior: frozen.
        weight: lambda, above 0.
        probes: K; their timesteps are low-discrepancy over all.
        layout: what the slots are.
        seed: of the noises.

    Raises:
        ModelError: fewer probes than 1, or a weight that is not above 0.
    """

    def __init__(
        self, prior: LayoutPrior, weight: float, probes: int, layout: LayoutFormat, seed: int = 0
    ) -> None:
        if not weight > 0 or probes < 1:
            raise ModelError(
                f"expected a prior with a weight above 0 and 1 probe at least, got {weight} and "
                f"{probes} probes."
            )
        self.prior, self.weight = prior, weight
        steps = len(prior.schedule)
        self.timesteps = torch.tensor(
            [int(van_der_corput(i) * steps) for i in range(1, probes + 1)]
        )
        generator = torch.Generator().manual_seed(seed)
        dim = prior.config.embedding_dim
        of_object = torch.randn(probes, SLOTS_PER_OBJECT, dim, generator=generator)
        of_crop = torch.randn(probes, CROP_SLOTS if layout.crop else 0, dim, generator=generator)
        # Equal for all objects.
        self.noises = torch.cat([of_object.repeat(1, layout.max_objects, 1), of_crop], dim=1)

    def __call__(self, v: Tensor) -> Tensor:
        """Token embeddings [N, S, D] to [N], differentiable, on ``v``'s device."""
        k = len(self.timesteps)
        rows = len(v) if v.requires_grad else max(1, ROWS // k)
        device = self.prior.device
        noises = self.noises.to(device)
        losses = [
            self.prior.losses(part.to(device), self.timesteps, noises).mean(dim=1)
            for part in v.split(max(1, rows))
        ]
        return self.weight * torch.cat(losses).to(v.device)

    def identity(self) -> dict[str, Any]:
        """Weight, probes and the prior's weights, for JSON."""
        return {
            "weight": self.weight,
            "probes": len(self.timesteps),
            "weights": fingerprint(self.prior),
        }
