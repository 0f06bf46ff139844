"""Trains the zoo's layout-to-image models in pixel space, transformer and layout encoder together.

    loss = w_t || eps - eps_theta(x_t, t, layout) ||^2,  w_t = 1 or min(1 / SNR_t, max_weight)

With w_t = 1 / SNR_t this is the error of the predicted x0. eps is predicted better the more of it
there is, so that without weights the steep early timesteps rule, where x_t shows every large object
by itself and the layout says nothing new.

No layout is ever left out: the layout without objects is that of a picture without objects, not of
any picture, because a detector compares pictures with and without an object in the layout.

Most timesteps are drawn from the middle of the schedule, where a detector looks; the rest from all
of it, so that the model generates, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dive_fast.training.loop import (
    LOG,
    average_into,
    copy_into,
    log_losses,
    read_state,
    take_step,
    write_state,
)

OBJECT_SLOTS = 3  # class, top-left corner, bottom-right corner
LOG_EVERY = 250
STATE_EVERY = 1000

# From the number of a step to its pictures, uint8 [B, h, w] or [B, h, w, c], and their layouts as
# tokens, int64 [B, S]. The same number always gives the same ones, which makes resuming exact.
Draw = Callable[[int], tuple[np.ndarray, Tensor]]


@dataclass(frozen=True)
class LayoutTrainingConfig:
    """What a layout-to-image model is made of and how long it learns.

    The first ones are those of ``models.layout_transformer.build_layout_transformer``.

    Attributes:
        t_range, t_share: this share of every batch has its timesteps in this part of the schedule.
        max_weight: bound of the weights 1 / SNR_t; None for no weights.
    """

    sample_size: int
    in_channels: int
    patch_size: int
    channels: int
    layers: int
    heads: int
    width: int
    encoder_layers: int
    encoder_heads: int
    t_range: tuple[float, float] = (0.05, 0.7)
    t_share: float = 0.875
    max_weight: float | None = None
    steps: int = 8_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    seed: int = 0


SCENES = LayoutTrainingConfig(
    sample_size=32,
    in_channels=1,
    patch_size=4,
    channels=128,
    layers=6,
    heads=4,
    width=128,
    encoder_layers=1,
    encoder_heads=4,
)


def train_layout_model(
    model: nn.Module,
    draw: Draw,
    held_out: tuple[np.ndarray, Tensor],
    none: int,
    config: LayoutTrainingConfig,
    out: Path,
    progress: bool = True,
    data: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Trains it in place; at the end it holds its averaged (EMA) weights.

    Every 1,000 steps the whole state goes to ``out/training.pt``; a run that was cut off and is
    started again with the same configuration and data goes on from there. Every 250 steps the
    losses are appended to ``out/training.jsonl``: of the training, and of the held-out pictures
    with their layout (``layout``) and with that of an empty picture (``empty``), at the weights of
    that step.

    Args:
        model: takes x_t [B, C, h, w], t [B] and tokens [B, S], and gives the noise.
        draw: the batch of every step.
        held_out: pictures and tokens that are never trained on.
        none: the token of all slots of an absent object.
        data: what tells the pictures and layouts that are learned from others.

    Returns:
        The final losses of the held-out pictures, "layout" and "empty".

    Raises:
        RunError: ``out`` holds the state of a run with another configuration or other data, or a
            damaged one, or cannot be written.
    """
    from diffusers import DDPMScheduler

    generator = torch.Generator().manual_seed(config.seed)
    model.train()
    parameters = list(model.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    alpha_bar = DDPMScheduler(beta_schedule="linear").alphas_cumprod

    whole = {**asdict(config), "data": data}
    first, state = 0, read_state(out, whole)
    if state is not None:
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema = state["ema"]
        generator.set_state(state["generator"])

    (out / LOG).touch()
    running = None
    bar = tqdm(
        range(first, config.steps),
        initial=first,
        total=config.steps,
        disable=not progress,
        desc="train",
        unit="step",
    )
    for step in bar:
        images, tokens = draw(step)
        tokens = shuffle_objects(tokens, generator)
        x0 = to_x0(images)
        t = draw_timesteps(len(x0), len(alpha_bar), config, generator)
        eps = torch.randn(x0.shape, generator=generator)
        loss = noise_loss(model, x0, t, eps, tokens, alpha_bar, config.max_weight)
        take_step(optimizer, loss, step, config)
        average_into(ema, parameters, step, config.ema_decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if (step + 1) % LOG_EVERY == 0:
            losses = {"loss": running, **held_out_losses(model, held_out, none, config, alpha_bar)}
            log_losses(out, step + 1, losses)
            bar.set_postfix({name: f"{loss:.4f}" for name, loss in losses.items()})
        if (step + 1) % STATE_EVERY == 0:
            state = {
                "config": whole,
                "step": step + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "generator": generator.get_state(),
            }
            write_state(out, state)

    copy_into(parameters, ema)
    return held_out_losses(model.eval(), held_out, none, config, alpha_bar)


def to_x0(images: np.ndarray) -> Tensor:
    """uint8 [B, h, w] or [B, h, w, c] to float32 [B, c, h, w] in [-1, 1]."""
    x0 = torch.from_numpy(images).float().div(127.5).sub(1)
    return x0.unsqueeze(1) if x0.ndim == 3 else x0.permute(0, 3, 1, 2)


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
    n_objects = tokens.shape[1] // OBJECT_SLOTS
    triples = tokens[:, : n_objects * OBJECT_SLOTS].view(len(tokens), n_objects, OBJECT_SLOTS)
    order = torch.rand(len(tokens), n_objects, generator=generator).argsort(dim=1)
    shuffled = triples.gather(1, order[:, :, None].expand_as(triples)).flatten(1)
    return torch.cat([shuffled, tokens[:, n_objects * OBJECT_SLOTS :]], dim=1)


def empty(tokens: Tensor, none: int) -> Tensor:
    """Layouts of the same form without objects."""
    emptied = tokens.clone()
    emptied[:, : tokens.shape[1] // OBJECT_SLOTS * OBJECT_SLOTS] = none
    return emptied


def noise_loss(
    model: nn.Module,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    tokens: Tensor,
    alpha_bar: Tensor,
    max_weight: float | None = None,
) -> Tensor:
    """Mean of w_t || eps - eps_theta(a_t x0 + s_t eps, t, layout) ||^2 / dim over the batch."""
    a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    x_t = a[:, None, None, None] * x0 + s[:, None, None, None] * eps
    prediction = model(x_t, t, tokens)
    if max_weight is None:
        return F.mse_loss(prediction, eps)
    weight = ((1 - alpha_bar[t]) / alpha_bar[t]).clamp(max=max_weight)
    return ((prediction - eps).square().mean(dim=(1, 2, 3)) * weight).mean()


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    held_out: tuple[np.ndarray, Tensor],
    none: int,
    config: LayoutTrainingConfig,
    alpha_bar: Tensor,
) -> dict[str, float]:
    """The loss with the true and with the empty layout, on the same noises."""
    images, tokens = held_out
    generator = torch.Generator().manual_seed(config.seed)
    x0 = to_x0(images)
    t = draw_timesteps(len(x0), len(alpha_bar), config, generator)
    eps = torch.randn(x0.shape, generator=generator)
    layouts = {"layout": tokens, "empty": empty(tokens, none)}
    return {
        name: noise_loss(model, x0, t, eps, layout, alpha_bar, config.max_weight).item()
        for name, layout in layouts.items()
    }
