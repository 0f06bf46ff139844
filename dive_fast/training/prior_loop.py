"""Trains the prior over layouts.

    -log p(k | v_t), the mean over all slots, at random t and noise

with k the slot's token. The prediction that makes it least is the one that makes the loss of the
noise least (``layout_prior``), and its gradient does not fade where the noise is nearly known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dive_fast.priors.layout_prior import LayoutPrior
from dive_fast.training.layout import shuffle_objects
from dive_fast.training.loop import (
    LOG,
    average_into,
    copy_into,
    log_losses,
    read_state,
    take_step,
    write_state,
)

LOG_EVERY = 500
STATE_EVERY = 1000
LEGIBLE = 0.25  # share of the schedule; noise below it leaves a token legible
HELD_OUT_ROWS = 2048  # (layout, noise) rows that the held-out loss is the mean of, at least

# From the number of a step to its layouts as tokens, int64 [B, S]; the same number always gives
# the same ones, which makes resuming exact.
Draw = Callable[[int], Tensor]


@dataclass(frozen=True)
class PriorTrainingConfig:
    """What a prior is made of and how long it learns."""

    width: int = 192
    layers: int = 2
    heads: int = 4
    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    seed: int = 0


def train_prior(
    prior: LayoutPrior,
    table: Tensor,
    draw: Draw,
    held_out: Tensor,
    config: PriorTrainingConfig,
    out: Path,
    progress: bool = True,
) -> float:
    """Trains in place; at the end the prior holds its averaged (EMA) weights.

    Every 1,000 steps the whole state goes to ``out/training.pt``; a run that was cut off and is
    started again with the same configuration goes on from there. Every 500 steps the loss of the
    training (``loss``, of the tokens) and that of denoising the held-out layouts (``held_out``) are
    appended to ``out/training.jsonl``, at the weights of that step.

    Args:
        prior: untrained.
        table: the frozen embeddings of the tokens, float32 [V, D].
        draw: the layouts of every step; their objects are shuffled here.
        held_out: tokens int64 [n, S] that are never trained on.

    Returns:
        The final loss of denoising the held-out layouts.

    Raises:
        RunError: ``out`` holds the state of a run with another configuration, or a damaged one,
            or cannot be written.
    """
    generator = torch.Generator().manual_seed(config.seed)
    parameters = list(prior.train().requires_grad_(True).parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    # Priors of another model, or of other layouts, differ in their configuration.
    whole = {**asdict(config), "prior": dict(prior.config)}

    first, state = 0, read_state(out, whole)
    if state is not None:
        first = state["step"]
        prior.load_state_dict(state["model"])
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
        loss = token_loss(prior, table, shuffle_objects(draw(step), generator), generator)
        take_step(optimizer, loss, step, config)
        average_into(ema, parameters, step, config.ema_decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if (step + 1) % LOG_EVERY == 0:
            losses = {"loss": running, "held_out": held_out_loss(prior, table, held_out, config)}
            log_losses(out, step + 1, losses)
            bar.set_postfix({name: f"{loss:.4f}" for name, loss in losses.items()})
        if (step + 1) % STATE_EVERY == 0:
            state = {
                "config": whole,
                "step": step + 1,
                "model": prior.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "generator": generator.get_state(),
            }
            write_state(out, state)

    copy_into(parameters, ema)
    prior.eval().requires_grad_(False)
    return held_out_loss(prior, table, held_out, config)


def token_loss(
    prior: LayoutPrior, table: Tensor, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """The mean of -log p(k | v_t) over layouts and slots."""
    v = table[tokens]
    t = slot_times(len(prior.schedule), tokens.shape, generator)
    v_t = prior.noised(v, t, torch.randn(v.shape, generator=generator))
    pairs = zip(prior.log_posteriors(v_t, t), prior.positions(tokens), strict=True)
    picked = [logs.gather(2, at[..., None]).flatten() for logs, at in pairs]
    return -torch.cat(picked).mean()


def slot_times(n: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Timesteps int64 [B, S], below n.

    Half of the layouts have one for all slots, as in diffusion. In the other half a random share
    of the slots has any, and the rest so little noise that it can be read.
    """
    rows, _ = shape
    same = torch.randint(n, (rows, 1), generator=generator)
    anything = torch.randint(n, shape, generator=generator)
    legible = (LEGIBLE * anything).long()
    hidden = torch.rand(shape, generator=generator) < torch.rand(rows, 1, generator=generator)
    mixed = torch.where(hidden, anything, legible)
    return torch.where(torch.rand(rows, 1, generator=generator) < 0.5, same, mixed)


def denoising_loss(prior: LayoutPrior, v: Tensor, generator: torch.Generator) -> Tensor:
    """|| eps - eps_phi(v_t, t) ||^2 / dim at one random t and noise for each layout, the mean."""
    t = torch.randint(len(prior.schedule), (len(v),), generator=generator)
    eps = torch.randn(v.shape, generator=generator)
    return (eps - prior(prior.noised(v, t, eps), t)).square().mean()


@torch.no_grad()
def held_out_loss(
    prior: LayoutPrior, table: Tensor, held_out: Tensor, config: PriorTrainingConfig
) -> float:
    """The same on layouts that are not trained on, always with the same noises."""
    generator = torch.Generator().manual_seed(config.seed)
    repeats = -(-HELD_OUT_ROWS // len(held_out))
    losses = [denoising_loss(prior, table[held_out], generator).item() for _ in range(repeats)]
    return sum(losses) / repeats
