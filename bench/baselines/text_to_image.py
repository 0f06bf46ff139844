"""Diffusion Classifier (arXiv 2303.16203) on a text-conditional ``UNet2DConditionModel``.

The arguments, the results, the order of operations and the random draws are those of the published
``eval_prob_adaptive.py``: one image at a time, its rows prompt by prompt. Written anew, without the
progress bar; tensors are moved to the latent's device instead of a global one.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import Run, timed
from bench.baselines.diffusion_classifier import (
    POINTWISE_LOSSES,
    all_timesteps,
    append_stage,
    n_evaluations,
    stage_requests,
    stage_timesteps,
)

# The published script looks T up by args.version; all its versions have this one.
N_TIMESTEPS = 1000


def eval_prob_adaptive(
    unet: nn.Module,
    latent: Tensor,
    text_embeds: Tensor,
    scheduler: Any,
    args: Namespace,
    latent_size: int = 64,
    all_noise: Tensor | None = None,
) -> tuple[int, dict[int, dict[str, Tensor]]]:
    """Stages of enumeration, each on more timesteps and for the prompts that the last one kept.

    Args:
        latent: [1, C, h, w].
        text_embeds: [P, L, D].
        scheduler: has ``alphas_cumprod``; with float16 it is rounded *in place*, as published.
        args: n_samples, to_keep, n_trials, batch_size, dtype, loss.
        latent_size: of the noise, if it is drawn here.
        all_noise: [max(n_samples) * n_trials, C, h, w], drawn from the global generator if None.

    Returns:
        The prompt, and for every prompt its timesteps ``"t"`` and errors ``"pred_errors"``.
    """
    if all_noise is None:
        n_noises = max(args.n_samples) * args.n_trials
        all_noise = torch.randn((n_noises, 4, latent_size, latent_size), device=latent.device)
    if args.dtype == "float16":
        all_noise = all_noise.half()
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.half()

    data: dict[int, dict[str, Tensor]] = {}
    evaluated: set[int] = set()
    remaining = list(range(len(text_embeds)))
    t_to_eval = all_timesteps(N_TIMESTEPS, max(args.n_samples))
    for n, n_to_keep in zip(args.n_samples, args.to_keep, strict=True):
        new = [t for t in stage_timesteps(t_to_eval, n) if t not in evaluated]
        rows = stage_requests(remaining, new, len(evaluated), args.n_trials)
        ts, noise_idxs, prompts = rows
        evaluated.update(new)
        errors = eval_error(
            unet,
            scheduler,
            latent,
            all_noise,
            ts.tolist(),
            noise_idxs.tolist(),
            text_embeds,
            prompts.tolist(),
            args.batch_size,
            args.dtype,
            args.loss,
        )
        append_stage(data, remaining, ts, prompts, errors)
        scores = torch.tensor([-data[prompt]["pred_errors"].mean() for prompt in remaining])
        remaining = [remaining[i] for i in torch.topk(scores, k=n_to_keep).indices.tolist()]
    assert len(remaining) == 1, f"the last stage must keep 1 prompt, got {len(remaining)}."
    return remaining[0], data


def eval_error(
    unet: nn.Module,
    scheduler: Any,
    latent: Tensor,
    all_noise: Tensor,
    ts: Sequence[int],
    noise_idxs: Sequence[int],
    text_embeds: Tensor,
    text_embed_idxs: Sequence[int],
    batch_size: int = 32,
    dtype: str = "float32",
    loss: str = "l2",
) -> Tensor:
    """The error of every row against the noise, whatever the scheduler predicts: [n], CPU."""
    assert len(ts) == len(noise_idxs) == len(text_embed_idxs)
    pred_errors = torch.zeros(len(ts))
    with torch.inference_mode():
        for i in range(0, len(ts), batch_size):
            t = torch.tensor(ts[i : i + batch_size])
            eps = all_noise[noise_idxs[i : i + batch_size]]
            alpha_bar = scheduler.alphas_cumprod[t]
            a = (alpha_bar**0.5).view(-1, 1, 1, 1).to(latent.device)
            s = ((1 - alpha_bar) ** 0.5).view(-1, 1, 1, 1).to(latent.device)
            x_t = latent * a + eps * s
            t = t.to(latent.device)
            text = text_embeds[text_embed_idxs[i : i + batch_size]]
            t_input = t.half() if dtype == "float16" else t
            eps_theta = unet(x_t, t_input, encoder_hidden_states=text).sample
            error = POINTWISE_LOSSES[loss](eps, eps_theta, reduction="none").mean(dim=(1, 2, 3))
            pred_errors[i : i + len(t)] = error.cpu()
    return pred_errors


def run(
    unet: nn.Module,
    latent: Tensor,
    text_embeds: Tensor,
    scheduler: Any,
    args: Namespace,
    latent_size: int = 64,
    all_noise: Tensor | None = None,
) -> Run:
    """``eval_prob_adaptive`` and what it cost; arguments as there."""
    arguments = (unet, latent, text_embeds, scheduler, args, latent_size, all_noise)
    (pred, data), seconds = timed(lambda: eval_prob_adaptive(*arguments))
    return Run(pred, n_evaluations(data), seconds)
