"""The noise-prediction loss of (image, probe, condition) rows: how well y explains x0.

x_t = a_t x0 + s_t eps
l(y; x0, t, eps) = w_t || target - f(x_t, t, y) ||^2 / dim

Where an image has weights w(i, j) of its pixels, the mean over them is sum(w e) / sum(w), of the
error e(i, j) that is the mean over the channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dive_fast import ops
from dive_fast.core.probes import ProbeList
from dive_fast.errors import DiveFastError, shown
from dive_fast.models.protocol import Model

NORMS = ("l2", "l1", "huber")


class DeviceProbes(NamedTuple):
    """A probe list where the network is, with the schedule's factors looked up."""

    timesteps: torch.Tensor  # int64 [K]
    noise: torch.Tensor  # float32 [N, C, h, w]
    noise_index: torch.Tensor  # int64 [K]
    a: torch.Tensor  # float32 [K]
    s: torch.Tensor  # float32 [K]
    weights: torch.Tensor  # float32 [K], w_t


class PixelWeights(NamedTuple):
    """What the pixels of B images count, on the device.

    Attributes:
        values: float32 [B, h, w], of mean 1 for every image; ones where none are given.
        given: bool [B].
    """

    values: torch.Tensor
    given: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """What is measured on every row. ``norm`` is "l2" (published), "l1" or "huber"."""

    norm: str = "l2"

    def __post_init__(self) -> None:
        if not isinstance(self.norm, str) or self.norm not in NORMS:
            raise DiveFastError(f"expected a loss of {', '.join(NORMS)}, got {shown(self.norm)}.")

    def place(self, model: Model, probes: ProbeList) -> DeviceProbes:
        """Moves the probes to the model's device once per run."""
        probes.check(model.latent_shape, len(model.schedule))
        t = probes.timesteps
        weights = torch.ones(len(probes)) if probes.weights is None else probes.weights
        a, s = model.schedule.a[t], model.schedule.s[t]
        parts = (t, probes.noise, probes.noise_index, a, s, weights)
        return DeviceProbes(*(part.to(model.device) for part in parts))

    def noised(
        self,
        x0: torch.Tensor,
        image_index: torch.Tensor,
        probes: DeviceProbes,
        probe_index: torch.Tensor,
    ) -> torch.Tensor:
        """x_t of M rows, float32 [M, C, h, w].

        Args:
            x0: float32 [B, C, h, w], the images in the batch.
            image_index: int64 [M], the image of each row.
            probe_index: int64 [M], the probe of each row.
        """
        a, s = probes.a[probe_index], probes.s[probe_index]
        return ops.q_sample(x0, image_index, probes.noise, probes.noise_index[probe_index], a, s)

    def compare(
        self,
        model: Model,
        prediction: torch.Tensor,
        x0: torch.Tensor,
        image_index: torch.Tensor,
        probes: DeviceProbes,
        probe_index: torch.Tensor,
        pixel_weights: PixelWeights | None = None,
    ) -> torch.Tensor:
        """The loss of M predictions, float32 [M], differentiable in ``prediction``.

        Args:
            prediction: [M, C or 2C, h, w], what the network made of ``noised``; the other arguments
                are those of ``noised``.
            pixel_weights: of the images, None where no image has any. An image without has the
                same loss whatever is beside it in the batch.
        """
        rows = (image_index, probes, probe_index)
        if pixel_weights is not None:
            weighted = self.error_map(model, prediction, x0, *rows, pixel_weights).mean(dim=(1, 2))
            if pixel_weights.given.all():
                return weighted
        arguments = self._arguments(prediction, x0, *rows)
        losses = ops.noise_prediction_loss(*arguments, target=model.schedule.target, norm=self.norm)
        losses = losses * probes.weights[probe_index]
        if pixel_weights is None:
            return losses
        return torch.where(pixel_weights.given[image_index], weighted, losses)

    def error_map(
        self,
        model: Model,
        prediction: torch.Tensor,
        x0: torch.Tensor,
        image_index: torch.Tensor,
        probes: DeviceProbes,
        probe_index: torch.Tensor,
        pixel_weights: PixelWeights | None = None,
    ) -> torch.Tensor:
        """Where M predictions are wrong, float32 [M, h, w]: ``compare`` before the mean."""
        arguments = self._arguments(prediction, x0, image_index, probes, probe_index)
        maps = ops.noise_prediction_error_map(
            *arguments, target=model.schedule.target, norm=self.norm
        )
        maps = maps * probes.weights[probe_index, None, None]
        return maps if pixel_weights is None else maps * pixel_weights.values[image_index]

    @staticmethod
    def _arguments(
        prediction: torch.Tensor,
        x0: torch.Tensor,
        image_index: torch.Tensor,
        probes: DeviceProbes,
        probe_index: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """What the loss ops take, without target and norm."""
        noise_index = probes.noise_index[probe_index]
        factors = probes.a[probe_index], probes.s[probe_index]
        return (prediction, probes.noise, noise_index, x0, image_index, *factors)
