"""The loss of layout-to-image models, and the configuration that it depends on.

    loss = w_t || eps - eps_theta(x_t, t, layout) ||^2,  w_t = 1 or min(1 / SNR_t, max_weight)

With w_t = 1 / SNR_t this is the error of the predicted x0. eps is predicted better the more of it
there is, so that without weights the steep early timesteps rule, where x_t shows every large object
by itself and the layout says nothing new.

A network may predict x0 instead ("sample"), from which eps follows; its loss is the same,

    loss = w_t SNR_t || x0 - x0_theta(x_t, t, layout) ||^2

but the noise of a patch has as many dimensions as the patch has numbers, all of which a network
that predicts eps must carry through: 192 of 8 x 8 pixels in colour do not fit through 128 channels.
Pictures have few (Li and He 2025, arXiv 2511.13720).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dive_fast.core.schedule import Schedule
from dive_fast.core.timesteps import BINS, TimestepWeights
from dive_fast.training.state import Course


@dataclass(frozen=True, kw_only=True)
class LayoutTrainingConfig(Course):
    """What a layout-to-image model is made of and how long it learns.

    The first ones are those of ``build_layout_transformer``.

    Attributes:
        t_range, t_share: this share of every batch has its timesteps in this part of the schedule.
        max_weight: bound of the weights 1 / SNR_t; None for no weights.
        predicts: "epsilon" or "sample", what the network gives.
        contrast: lambda of loss + lambda CE, see ``layout_rivals``; 0 for denoising alone.
        rivals: k, the layouts that the annotated one is told from.
        raster: the network is shown the layout drawn, see ``models.layout_to_image.raster``.
        nameless: share of the images whose objects are of no known class, as they are at first in a
            search.
    """

    sample_size: int = 32
    in_channels: int
    patch_size: int = 4
    channels: int = 128
    layers: int = 6
    heads: int = 4
    width: int = 128
    encoder_layers: int = 1
    encoder_heads: int = 4
    t_range: tuple[float, float] = (0.05, 0.7)
    t_share: float = 0.875
    max_weight: float | None = None
    contrast: float = 0.0
    rivals: int = 3
    raster: bool = False
    nameless: float = 0.0
    predicts: Literal["epsilon", "sample"] = "epsilon"
    steps: int = 8_000

    def scheduler(self) -> DDPMScheduler:
        """The noise schedule, and what is predicted."""
        return DDPMScheduler(beta_schedule="linear", prediction_type=self.predicts)

    def weights(self, alpha_bar: Tensor) -> Tensor:
        """What an error of the network's own prediction counts at each timestep, [N] like it."""
        snr = alpha_bar / (1 - alpha_bar)
        if self.max_weight is None:
            of_eps = torch.ones_like(snr)
        else:
            of_eps = snr.reciprocal().clamp(max=self.max_weight)
        return of_eps if self.predicts == "epsilon" else of_eps * snr


def to_x0(images: Tensor) -> Tensor:
    """uint8 [B, c, h, w] to float32 of the same shape in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def draw_timesteps(
    n: int, n_timesteps: int, config: LayoutTrainingConfig, generator: torch.Generator
) -> Tensor:
    """int64 [n]: the first ``t_share`` of them in ``t_range``, the rest anywhere."""
    low, high = (share * n_timesteps for share in config.t_range)
    u = torch.rand(n, generator=generator)
    focused = torch.arange(n) < config.t_share * n
    return torch.where(focused, low + u * (high - low), u * n_timesteps).long()


def noise_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    tokens: Tensor,
    alpha_bar: Tensor,
    config: LayoutTrainingConfig,
) -> Tensor:
    """Mean of w_t || eps - eps_theta(a_t x0 + s_t eps, t, layout) ||^2 / dim over the batch.

    A network that predicts x0 has the same loss, see the module.
    """
    errors = errors_of(model, x0, t, eps, tokens, alpha_bar, config)
    return (errors * config.weights(alpha_bar[t])).mean()


def errors_of(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    tokens: Tensor,
    alpha_bar: Tensor,
    config: LayoutTrainingConfig,
) -> Tensor:
    """The mean square of what the network errs by, of eps or of x0, float32 [B].

    Args:
        model: x_t [B, C, h, w], t [B] and tokens [B, S] to its prediction [B, C, h, w].
        x0, eps: float32 [B, C, h, w].
        t: int64 [B].
        tokens: int64 [B, S].
        alpha_bar: float32 [T].
    """
    a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    x_t = a[:, None, None, None] * x0 + s[:, None, None, None] * eps
    target = eps if config.predicts == "epsilon" else x0
    return (model(x_t, t, tokens) - target).square().mean(dim=(1, 2, 3))


def errors_with_rivals(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    tokens: Tensor,
    rivals: Tensor,
    alpha_bar: Tensor,
    config: LayoutTrainingConfig,
) -> Tensor:
    """``errors_of`` the annotated layouts and k rivals each, int64 [B, k, S]: [B, 1 + k]."""
    n = 1 + rivals.shape[1]
    layouts = torch.cat([tokens[:, None], rivals], dim=1).flatten(0, 1)
    x0, t, eps = (each.repeat_interleave(n, dim=0) for each in (x0, t, eps))
    return errors_of(model, x0, t, eps, layouts, alpha_bar, config).view(-1, n)


def learned_timesteps(config: LayoutTrainingConfig, schedule: Schedule) -> TimestepWeights:
    """A detector's probes lie where the training looked, and count as they did there."""
    n, (low, high) = len(schedule), config.t_range
    weights = config.weights(schedule.a.square()).view(BINS, n // BINS).mean(dim=1)
    inside = [low <= (b + 0.5) / BINS < high for b in range(BINS)]
    density = tuple(float(seen) for seen in inside)
    return TimestepWeights(n, density, tuple(round(w, 6) for w in weights.tolist()))
