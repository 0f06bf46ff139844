"""Trains layout-to-image models in pixel space, transformer and layout encoder together.

    loss = w_t || eps - eps_theta(x_t, t, layout) ||^2,  w_t = 1 or min(1 / SNR_t, max_weight)

With w_t = 1 / SNR_t this is the error of the predicted x0. eps is predicted better the more of it
there is, so that without weights the steep early timesteps rule, where x_t shows every large object
by itself and the layout says nothing new.

A network may predict x0 instead ("sample"), from which eps follows; its loss is the same,

    loss = w_t SNR_t || x0 - x0_theta(x_t, t, layout) ||^2

but the noise of a patch has as many dimensions as the patch has numbers, all of which a network
that predicts eps must carry through: 192 of 8 x 8 pixels in colour do not fit through 128 channels.
Pictures have few (Li and He 2025, arXiv 2511.13720).

No layout is ever left out: the layout without objects is that of an image without objects, not of
any image, because a detector compares images with and without an object in the layout.

Most timesteps are drawn from the middle of the schedule, where a detector looks; the rest from all
of it, so that the model generates, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.core.schedule import Schedule
from dive_fast.core.timesteps import BINS, TimestepWeights
from dive_fast.logs import LogTo
from dive_fast.models.files.sidecar import write_extra
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.transformer import (
    LayoutTransformerModel,
    build_layout_transformer,
    denoise,
)
from dive_fast.training.layout_rivals import Contrast, rival_layouts
from dive_fast.training.loop import Course, train

TOKEN_STD = 0.5
RIVALS = 1  # tells their draws from others of a step

# Images, uint8 [B, c, h, w], and their layouts as tokens, int64 [B, S].
Batch = tuple[Tensor, Tensor]
# From the number of a step to its batch. The same number always gives the same one, which makes
# resuming exact.
Draw = Callable[[int], Batch]


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


def train_into(
    out: Path,
    layout: LayoutFormat,
    config: LayoutTrainingConfig,
    draw: Draw,
    held_out: Batch,
    command: str,
    progress: bool,
    data: Mapping[str, Any],
    log_to: LogTo | None = None,
    finish: Callable[[LayoutTransformerModel], dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Trains a new model and writes its directory; returns its held-out losses.

    Args:
        data: what tells the images and layouts that are learned from others.
        finish: is given the trained model, whose files are there by then, and returns further
            entries of ``dive_fast.json``, which is written last.

    Raises:
        RunError: the directory cannot be written, or holds another training's state.
    """
    torch.manual_seed(config.seed)
    trained = build(layout, config)
    whole = {"layout": layout.to_dict(), **data}
    expected = train_layout_model(
        trained, draw, held_out, layout, config, out, progress, whole, log_to
    )
    model = LayoutTransformerModel(trained.transformer, trained.encoder, config.scheduler())
    # Half precision halves the file; what is loaded again computes in float32.
    model.to(torch.device("cpu"), torch.float16).save_pretrained(out)
    facts = {"command": command, "config": dataclasses.asdict(config), "expected": expected}
    if config.max_weight is not None:
        model.timesteps = learned_timesteps(config, model.schedule)
        facts["timesteps"] = model.timesteps.to_dict()
    if finish is not None:
        model.to(torch.device("cpu"), torch.float32)
        facts |= finish(model)
    write_extra(out, facts)
    return expected


def train_layout_model(
    model: nn.Module,
    draw: Draw,
    held_out: Batch,
    layout: LayoutFormat,
    config: LayoutTrainingConfig,
    out: Path,
    progress: bool = True,
    data: Mapping[str, Any] | None = None,
    log_to: LogTo | None = None,
) -> dict[str, float]:
    """Trains it in place; at the end it holds its averaged (EMA) weights.

    What is on disk meanwhile, and how a run that was cut off goes on, says ``loop.train``. Logged
    are the losses of the training, and of the held-out images with their layout (``layout``) and
    with that of an empty image (``empty``).

    Args:
        model: takes x_t [B, C, h, w], t [B] and tokens [B, S], and gives the noise.
        draw: the batch of every step.
        held_out: images and tokens that are never trained on.
        layout: what the tokens mean.
        data: what tells the images and layouts that are learned from others.

    Returns:
        The final losses of the held-out images, "layout" and "empty".

    Raises:
        RunError: ``out`` holds the state of a run with another configuration or other data, or a
            damaged one, or cannot be written.
    """
    alpha_bar = config.scheduler().alphas_cumprod

    def predict(x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        with config.autocast(x_t.device), _attention(x_t.device):
            return model(x_t, t, tokens).float()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        images, tokens = draw(step)
        tokens = shuffle_objects(tokens, generator)
        x0 = to_x0(images)
        t = draw_timesteps(len(x0), len(alpha_bar), config, generator)
        eps = torch.randn(x0.shape, generator=generator)
        if config.contrast == 0:
            return noise_loss(predict, x0, t, eps, tokens, alpha_bar, config)
        rng = np.random.default_rng((config.seed, step, RIVALS))
        rivals, same = rival_layouts(tokens, layout, config.rivals, rng)
        rivals = shuffle_objects(rivals.flatten(0, 1), generator).view_as(rivals)
        errors = errors_with_rivals(predict, x0, t, eps, tokens, rivals, alpha_bar, config)
        denoised = (errors[:, 0] * config.weights(alpha_bar[t])).mean()
        return denoised + config.contrast * model.contrast(errors, same)

    return train(
        model.train(),
        loss_of,
        config,
        out,
        identity={"data": data},
        held_out=lambda: held_out_losses(model, held_out, layout, config, alpha_bar),
        log_to=log_to,
        progress=progress,
    ).held_out


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """The plain formula on a CPU: with few tokens the fused backward takes twice as long there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


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


def shuffle_objects(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """The objects of every layout in a random order, present or not; tokens int64 [B, S].

    Slots after the last whole triple (the crop's corners) stay where they are.
    """
    end = _objects_end(tokens)
    triples = tokens[:, :end].unflatten(1, (-1, SLOTS_PER_OBJECT))
    order = torch.rand(triples.shape[:2], generator=generator).argsort(dim=1)
    shuffled = triples.gather(1, order[:, :, None].expand_as(triples)).flatten(1)
    return torch.cat([shuffled, tokens[:, end:]], dim=1)


def empty(tokens: Tensor, none: int) -> Tensor:
    """Layouts of the same form without objects."""
    emptied = tokens.clone()
    emptied[:, : _objects_end(tokens)] = none
    return emptied


def _objects_end(tokens: Tensor) -> int:
    """Where the slots of the objects end; those of a crop follow."""
    return tokens.shape[1] // SLOTS_PER_OBJECT * SLOTS_PER_OBJECT


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
    """The mean square of what the network errs by, of eps or of x0, [B]."""
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
    """The same of the annotated layouts and k rivals each, int64 [B, k, S]: [B, 1 + k]."""
    n = 1 + rivals.shape[1]
    layouts = torch.cat([tokens[:, None], rivals], dim=1).flatten(0, 1)
    x0, t, eps = (each.repeat_interleave(n, dim=0) for each in (x0, t, eps))
    return errors_of(model, x0, t, eps, layouts, alpha_bar, config).view(-1, n)


def held_out_losses(
    model: nn.Module,
    held_out: Batch,
    layout: LayoutFormat,
    config: LayoutTrainingConfig,
    alpha_bar: Tensor,
) -> dict[str, float]:
    """The loss with the true and with the empty layout, on the same noises.

    With ``contrast`` also ``told_apart``, the share of images whose annotated layout explains
    them better than a rival does, at one timestep.
    """
    images, tokens = held_out
    generator = torch.Generator().manual_seed(config.seed)
    x0 = to_x0(images)
    t = draw_timesteps(len(x0), len(alpha_bar), config, generator)
    eps = torch.randn(x0.shape, generator=generator)
    layouts = {"layout": tokens, "empty": empty(tokens, layout.none)}
    found = {
        name: noise_loss(model, x0, t, eps, which, alpha_bar, config).item()
        for name, which in layouts.items()
    }
    if config.contrast:
        rivals, _ = rival_layouts(tokens, layout, 1, np.random.default_rng((config.seed, RIVALS)))
        errors = errors_with_rivals(model, x0, t, eps, tokens, rivals, alpha_bar, config)
        found["told_apart"] = (errors[:, 0] < errors[:, 1]).double().mean().item()
    return found


def learned_timesteps(config: LayoutTrainingConfig, schedule: Schedule) -> TimestepWeights:
    """A detector's probes lie where the training looked, and count as they did there."""
    n, (low, high) = len(schedule), config.t_range
    weights = config.weights(schedule.a.square()).view(BINS, n // BINS).mean(dim=1)
    inside = [low <= (b + 0.5) / BINS < high for b in range(BINS)]
    density = tuple(float(seen) for seen in inside)
    return TimestepWeights(n, density, tuple(round(w, 6) for w in weights.tolist()))


class Trained(nn.Module):
    """A transformer and its layout encoder, as they are trained: x_t, t and tokens to the noise."""

    def __init__(self, transformer: nn.Module, encoder: LayoutEncoder, contrasted: bool) -> None:
        super().__init__()
        self.transformer, self.encoder = transformer, encoder
        self.contrast = Contrast() if contrasted else None

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.encoder.token_embedding(tokens))
        return denoise(self.transformer, x_t, t, hidden)


def build(layout: LayoutFormat, config: LayoutTrainingConfig) -> Trained:
    """The untrained model of a configuration."""
    transformer, encoder = build_layout_transformer(
        layout,
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        patch_size=config.patch_size,
        channels=config.channels,
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        encoder_layers=config.encoder_layers,
        encoder_heads=config.encoder_heads,
    )
    start_tokens(encoder, layout)
    return Trained(transformer, encoder, config.contrast > 0)


def start_tokens(encoder: LayoutEncoder, layout: LayoutFormat) -> None:
    """Corners that are near each other start with embeddings that are near each other.

    The first half of the width holds sines and cosines of x, the second half those of y. All tokens
    are of one size, large enough that the first steps do not wipe out where they began.
    """
    width = encoder.config.width
    # From one period over the whole image to one over two steps of the grid.
    n = width // 4
    frequencies = math.pi * (layout.grid / 2) ** (torch.arange(n) / max(1, n - 1))
    angles = torch.linspace(0, 1, layout.grid)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [G, width / 2]
    corners = torch.cat(
        [waves[None].expand(layout.grid, -1, -1), waves[:, None].expand(-1, layout.grid, -1)], dim=2
    )
    start, stop = layout.coordinate_range
    with torch.no_grad():
        table = encoder.token_embedding.weight.normal_(std=TOKEN_STD)
        table[start:stop, : 4 * n] = corners.flatten(0, 1) * (TOKEN_STD * math.sqrt(2))
        encoder.position_embedding.weight.normal_(std=TOKEN_STD)
