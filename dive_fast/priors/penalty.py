"""What a prior adds to the objective of a search for layouts: Bayes' rule.

    -log p(y | x0) / beta = L(y; x0) - (w / beta) log p(y) + const

A search that compares layouts token by token takes the prior's pseudo-log-likelihood
(``LayoutPrior.surprise``) for log p(y): it needs no noise, so neither the order of the objects nor
chance plays a part. It counts what two tokens say of each other twice, which w = 1/2 makes good. A
relaxed search, which needs a gradient, takes the bound of diffusion models,

    -log p(v) <= 1/2 sum_t (SNR(t - 1) / SNR(t) - 1) E || eps - eps_phi(v_t, t) ||^2

(SNR = a^2 / s^2), estimated from K fixed probes (t_k, eps_k). Sources: DIVE (arXiv 2504.17253);
variational diffusion models (arXiv 2107.00630).

All objects of a layout meet the same noise. Objects have no order, so a layout has one penalty in
whichever slots they stand, and what stays when an object is added, removed, moved or renamed is
compared under equal noise. Each object alone sees noise of the distribution that the prior was
trained on; that the others' is equal it never saw in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.numbers import is_whole
from dive_fast.core.probes import van_der_corput
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.errors import ModelError, shown
from dive_fast.models.files.checkpoint import fingerprint
from dive_fast.priors.layout_prior import LayoutPrior

ROWS = 2048  # (layout, probe) or (layout, slot) rows of one forward without gradient, at most


class LayoutPenalty:
    """-(w / beta) log p of layouts, in units of the model's loss.

    Args:
        prior: frozen.
        weight: w / beta, above 0.
        probes: K; their timesteps are low-discrepancy over all.
        layout: what the slots are.
        seed: of the noises.

    Raises:
        ModelError: fewer probes than 1, or a weight that is not above 0.
    """

    def __init__(
        self, prior: LayoutPrior, weight: float, probes: int, layout: LayoutFormat, seed: int = 0
    ) -> None:
        if not weight > 0 or not is_whole(probes, 1):
            raise ModelError(
                f"expected a prior with a weight above 0 and 1 probe at least, got {weight} and "
                f"{shown(probes)} probes."
            )
        self.prior, self.weight = prior, weight
        steps = len(prior.schedule)
        self.timesteps = torch.tensor([1 + int(u * (steps - 1)) for u in van_der_corput(probes)])
        generator = torch.Generator().manual_seed(seed)
        dim = prior.dim
        of_object = torch.randn(probes, SLOTS_PER_OBJECT, dim, generator=generator)
        of_crop = torch.randn(probes, layout.crop_slots, dim, generator=generator)
        # Equal for all objects.
        self.noises = torch.cat([of_object.repeat(1, layout.max_objects, 1), of_crop], dim=1)
        snr = (prior.schedule.a / prior.schedule.s).double().square()
        lost = snr[self.timesteps - 1] / snr[self.timesteps] - 1
        # Of the probes' losses, which are means over all dimensions: their bound in nats.
        self.nats = (lost / 2 * steps * self.noises[0].numel()).float()

    def __call__(self, v: Tensor) -> Tensor:
        """Token embeddings [N, S, D] to [N], differentiable, on ``v``'s device: by the bound."""
        k = len(self.timesteps)
        rows = len(v) if v.requires_grad else max(1, ROWS // k)
        device = self.prior.device
        noises, nats = self.noises.to(device), self.nats.to(device)
        losses = [
            (self.prior.losses(part.to(device), self.timesteps, noises) * nats).mean(dim=1)
            for part in v.split(max(1, rows))
        ]
        return self.weight * torch.cat(losses).to(v.device)

    @torch.no_grad()
    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [N, S], -1 where not known, to float64 [N]: by the pseudo-likelihood."""
        rows = max(1, ROWS // tokens.shape[1])
        parts = [self.prior.surprise(part.to(self.prior.device)) for part in tokens.split(rows)]
        return self.weight * torch.cat(parts).double().cpu()

    def identity(self) -> dict[str, Any]:
        """Weight, probes and the prior's weights, for JSON."""
        return {
            "weight": self.weight,
            "probes": len(self.timesteps),
            "weights": fingerprint(self.prior),
        }
