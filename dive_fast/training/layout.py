"""Trains layout-to-image models in pixel space; ``layout_losses`` has the loss.

No layout is ever left out: the layout without objects is that of an image without objects, not of
any image, because a detector compares images with and without an object in the layout.

Most timesteps are drawn from the middle of the schedule, where a detector looks; the rest from all
of it, so that the model generates, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.rivals import rival_layouts
from dive_fast.logs import LogTo
from dive_fast.models.files.sidecar import write_extra
from dive_fast.models.layout_to_image.transformer import LayoutTransformerModel
from dive_fast.training.layout_losses import (
    LayoutTrainingConfig,
    draw_timesteps,
    errors_with_rivals,
    learned_timesteps,
    noise_loss,
    to_x0,
)
from dive_fast.training.layout_network import build
from dive_fast.training.layout_tokens import empty, shuffle_objects, without_names
from dive_fast.training.loop import train

CPU = torch.device("cpu")
HELD_OUT_AT_ONCE = 16  # images that are measured together: larger batches are slower on a CPU
RIVALS = 1  # tells their draws from others of a step

# Images, uint8 [B, c, h, w], and their layouts as tokens, int64 [B, S].
Batch = tuple[Tensor, Tensor]
# From the number of a step to its batch. The same number always gives the same one, which makes
# resuming exact.
Draw = Callable[[int], Batch]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t, t and tokens to the prediction


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
    device: torch.device = CPU,
) -> dict[str, float]:
    """Trains a new model and writes its directory; returns its held-out losses.

    Args:
        data: what tells the images and layouts that are learned from others.
        finish: is given the trained model, whose files are there by then, and returns further
            entries of ``dive_fast.json``, which is written last.
        device: where the network is trained.

    Raises:
        RunError: the directory cannot be written, or holds another training's state.
    """
    torch.manual_seed(config.seed)
    trained = build(layout, config).to(device)
    whole = {"layout": layout.to_dict(), **data}
    expected = train_layout_model(
        trained, draw, held_out, layout, config, out, progress, whole, log_to
    )
    trained.to(CPU)
    model = LayoutTransformerModel(trained.transformer, trained.encoder, config.scheduler())
    # Half precision halves the file; what is loaded again computes in float32.
    model.to(CPU, torch.float16).save_pretrained(out)
    facts = {"command": command, "config": dataclasses.asdict(config), "expected": expected}
    if config.max_weight is not None:
        model.timesteps = learned_timesteps(config, model.schedule)
        facts["timesteps"] = model.timesteps.to_dict()
    if finish is not None:
        model.to(device, torch.float32)
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
        model: takes x_t [B, C, h, w], t [B] and tokens [B, S], and gives the noise. It is trained
            where its weights are; what is drawn is the same on every device.
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
    device = next(model.parameters()).device
    alpha_bar = config.scheduler().alphas_cumprod.to(device)

    def predict(x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        with config.autocast(device), _attention(device):
            return model(x_t, t, tokens).float()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        images, tokens = draw(step)
        tokens = shuffle_objects(tokens, generator)
        nameless = torch.zeros(len(tokens), dtype=torch.bool)
        if config.nameless:  # else nothing is drawn: an old command gives the same batches
            nameless = torch.rand(len(tokens), generator=generator) < config.nameless
        x0 = to_x0(images.to(device))
        t = draw_timesteps(len(x0), len(alpha_bar), config, generator)
        eps = torch.randn(x0.shape, generator=generator)
        given = [x0, t.to(device), eps.to(device)]
        if config.contrast == 0:
            tokens = without_names(tokens, layout, nameless).to(device)
            return noise_loss(predict, *given, tokens, alpha_bar, config)
        rng = np.random.default_rng((config.seed, step, RIVALS))
        rivals, same = rival_layouts(tokens, layout, config.rivals, rng, nameless)
        rivals = shuffle_objects(rivals.flatten(0, 1), generator)
        rivals = without_names(rivals, layout, nameless.repeat_interleave(config.rivals))
        rivals = rivals.unflatten(0, (len(tokens), -1))
        tokens = without_names(tokens, layout, nameless)
        layouts = [each.to(device) for each in (tokens, rivals)]
        errors = errors_with_rivals(predict, *given, *layouts, alpha_bar, config)
        denoised = (errors[:, 0] * config.weights(alpha_bar[given[1]])).mean()
        return denoised + config.contrast * model.contrast(errors, same.to(device))

    return train(
        model.train(),
        loss_of,
        config,
        out,
        identity={"data": data},
        held_out=lambda: held_out_losses(predict, held_out, layout, config, alpha_bar),
        log_to=log_to,
        progress=progress,
    ).held_out


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """The plain formula on a CPU: with few tokens the fused backward takes twice as long there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def held_out_losses(
    model: Predict,
    held_out: Batch,
    layout: LayoutFormat,
    config: LayoutTrainingConfig,
    alpha_bar: Tensor,
) -> dict[str, float]:
    """The loss with the true and with the empty layout, on the same noises, where alpha_bar lies.

    With ``contrast`` also ``told_apart``, the share of images whose annotated layout explains
    them better than a rival does, at one timestep.
    """
    images, tokens = held_out
    generator = torch.Generator().manual_seed(config.seed)
    x0 = to_x0(images)
    t = draw_timesteps(len(x0), len(alpha_bar), config, generator)
    eps = torch.randn(x0.shape, generator=generator)
    layouts = {"layout": tokens, "empty": empty(tokens, layout.none)}
    if config.contrast:
        rng = np.random.default_rng((config.seed, RIVALS))
        layouts["rival"] = rival_layouts(tokens, layout, 1, rng)[0][:, 0]
    asked = torch.stack(list(layouts.values()), dim=1)
    given = zip(*(x.split(HELD_OUT_AT_ONCE) for x in (x0, t, eps, asked)), strict=True)
    errors = torch.cat([_errors(model, *part, alpha_bar, config) for part in given]).cpu()
    weights = config.weights(alpha_bar.cpu()[t])
    by_name = dict(zip(layouts, errors.unbind(dim=1), strict=True))
    found = {name: float((by_name[name] * weights).mean()) for name in ("layout", "empty")}
    if config.contrast:
        better = by_name["layout"] < by_name["rival"]
        found["told_apart"] = better.double().mean().item()
    return found


def _errors(
    model: Predict,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    layouts: Tensor,
    alpha_bar: Tensor,
    config: LayoutTrainingConfig,
) -> Tensor:
    """``errors_of`` n layouts of each image, int64 [B, n, S]: [B, n], where alpha_bar lies."""
    moved = [each.to(alpha_bar.device) for each in (x0, t, eps, layouts[:, 0], layouts[:, 1:])]
    return errors_with_rivals(model, *moved, alpha_bar, config)
