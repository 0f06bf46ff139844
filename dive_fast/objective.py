"""The noise-prediction loss of (image, probe, condition) rows: how well y explains x0.

x_t = a_t x0 + s_t eps
l(y; x0, t, eps) = w_t || target - f(x_t, t, y) ||^2 / dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dive_fast import ops
from dive_fast.errors import DiveFastError
from dive_fast.models.protocol import Model
from dive_fast.probes import ProbeList

NORMS = ("l2", "l1", "huber")


class DeviceProbes(NamedTuple):
    """A probe list where the network is, with the schedule's factors looked up."""

    timesteps: torch.Tensor  # int64 [K]
    noise: torch.Tensor  # float32 [N, C, h, w]
    noise_index: torch.Tensor  # int64 [K]
    a: torch.Tensor  # float32 [K]
    s: torch.Tensor  # float32 [K]
    weights: torch.Tensor  # float32 [K], w_t


@dataclass(frozen=True)
class Objective:
    """What is measured on every row. ``norm`` is "l2" (published), "l1" or "huber"."""

    norm: str = "l2"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise DiveFastError(f"expected a loss of {', '.join(NORMS)}, got {self.norm!r}.")

    def place(self, model: Model, probes: ProbeList) -> DeviceProbes:
        """Moves the probes to the model's device once per run."""
        probes.check(model.latent_shape, len(model.schedule))
        t = probes.timesteps
        weights = torch.ones(len(probes)) if probes.weights is None else probes.weights
        a, s = model.schedule.a[t], model.schedule.s[t]
        parts = (t, probes.noise, probes.noise_index, a, s, weights)
        return DeviceProbes(*(part.to(model.device) for part in parts))

    def losses(
        self,
        model: Model,
        x0: torch.Tensor,
        image_index: torch.Tensor,
        probes: DeviceProbes,
        probe_index: torch.Tensor,
        condition: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of M rows, float32 [M], differentiable in ``condition``.

        Args:
            x0: float32 [B, C, h, w], the images in the batch.
            image_index: int64 [M], the image of each row.
            probe_index: int64 [M], the probe of each row.
            condition: float32 [M, D], the embedding of each row.
        """
        noise_index = probes.noise_index[probe_index]
        a, s = probes.a[probe_index], probes.s[probe_index]
        x_t = ops.q_sample(x0, image_index, probes.noise, noise_index, a, s)
        prediction = model.predict(x_t, probes.timesteps[probe_index], condition)
        losses = ops.noise_prediction_loss(
            prediction,
            probes.noise,
            noise_index,
            x0,
            image_index,
            a,
            s,
            target=model.schedule.target,
            norm=self.norm,
        )
        return losses * probes.weights[probe_index]
