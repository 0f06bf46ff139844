"""Diffusion Classifier's published functions, with the same arguments and results, on our engine.

Of the published script (https://github.com/diffusion-classifier/diffusion-classifier) only the
import changes:

    from dive_fast.compat import eval_prob_adaptive

By default a race finds the answer, with the published stages as its ceiling. ``mode="paper"``
follows the stages: the same timesteps and noises for the same prompts, and the same answer.
Source: arXiv 2303.16203.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dive_fast.compat.arguments import (
    Settings,
    check_choice,
    check_count,
    check_noise,
    check_tensors,
    read_indices,
    read_scheduler,
)
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, Losses, Search
from dive_fast.core.schedule import Schedule
from dive_fast.engine import Engine, Finished, Job
from dive_fast.engine.objective import NORMS, Objective
from dive_fast.errors import DiveFastError
from dive_fast.models import DTYPES
from dive_fast.models.unet.wrapped import GivenUNet, wrap_unet
from dive_fast.strategies import Task

MODES = ("race", "paper")


@torch.inference_mode(False)
def eval_prob_adaptive(
    unet: Any,
    latent: torch.Tensor,
    text_embeds: torch.Tensor,
    scheduler: Any,
    args: Any,
    latent_size: int = 64,
    all_noise: torch.Tensor | None = None,
    *,
    mode: str = "race",
) -> tuple[int, dict[int, dict[str, torch.Tensor]]]:
    """Which prompt explains a latent best; all arguments but ``mode`` are the published ones.

    Args:
        unet: a diffusers ``UNet2DConditionModel``, or anything called like one. It computes where
            it is and in its own dtype (float16 also on the CPU, natively, several times slower
            there than float32).
        latent: float [1, C, h, w], x0 times the VAE's scaling factor.
        text_embeds: float [P, L, D], one sequence per prompt.
        scheduler: a diffusers scheduler with ``alphas_cumprod`` [T].
        args: has ``n_samples`` and ``to_keep`` (one number per stage), ``n_trials``,
            ``batch_size``, ``dtype`` ("float32", "float16", or, as an extension, "bfloat16"),
            ``loss`` ("l2", "l1", "huber") and ``version``: T is 1000 for the published versions,
            and the scheduler's own where args has none.
        latent_size: side of the noise that is drawn; not used with ``all_noise``.
        all_noise: float [N, C, h, w], N >= max(n_samples) * n_trials. Drawn from torch's global
            generator on the latent's device if None, as published.
        mode: "race": prompts leave as soon as paired statistics say that they cannot win, and at
            the latest where the published stages drop them, so it never takes more evaluations (see
            ``CappedRace``). The prediction is compared to what the scheduler's ``prediction_type``
            says.
            "paper": the published stages. The prediction is compared to the noise, whatever the
            scheduler says, and with "float16" noise and ``alphas_cumprod`` are rounded to it first,
            both as published (but the scheduler given is not changed).

    Returns:
        The prompt's index, and for every prompt ``{"t": int64 [n], "pred_errors": float32 [n]}`` on
        the CPU: what was measured, in the order of measuring.

    Raises:
        DiveFastError: an argument that cannot be used, or errors that are not finite.
    """
    check_choice("mode", mode, MODES)
    settings = Settings.read(args)
    check_tensors(latent, text_embeds)
    stages = settings.stages(len(text_embeds))
    n_noises = max(settings.n_samples) * settings.n_trials
    if all_noise is None:
        shape = (n_noises, latent.shape[1], latent_size, latent_size)
        if latent.shape[2:] != shape[2:]:
            raise DiveFastError(
                f"latent must have shape [1, C, {latent_size}, {latent_size}] for "
                f"latent_size={latent_size}, got {list(latent.shape)}."
            )
        all_noise = torch.randn(shape, device=latent.device)
    else:
        check_noise(all_noise, latent, n_noises)
    all_noise = all_noise[:n_noises]

    paper = mode == "paper"
    alphas_cumprod, target = read_scheduler(scheduler)
    if paper:
        target = _published_target(target)
        if settings.dtype == "float16":
            all_noise, alphas_cumprod = all_noise.half(), alphas_cumprod.half()
    schedule = _schedule(alphas_cumprod, target)
    timesteps = settings.timesteps(stages, len(schedule), paper)
    probes = ProbeList(timesteps, all_noise)
    model = wrap_unet(unet, text_embeds, schedule, latent.shape[1:])
    strategy = stages if paper else settings.race()
    search = strategy.search(Task(model.vocabulary, probes))
    job = Job(0, _x0(latent), search)
    (finished,) = _run(model, [job], probes, settings.loss, settings.batch_size)
    return finished.answer.index, _measured(finished, probes)


@torch.inference_mode(False)
def eval_error(
    unet: Any,
    scheduler: Any,
    latent: torch.Tensor,
    all_noise: torch.Tensor,
    ts: Sequence[int],
    noise_idxs: Sequence[int],
    text_embeds: torch.Tensor,
    text_embed_idxs: Sequence[int],
    batch_size: int = 32,
    dtype: str = "float32",
    loss: str = "l2",
) -> torch.Tensor:
    """The error of every (timestep, noise, prompt); all arguments are the published ones.

    The prediction is compared to the noise, whatever the scheduler's ``prediction_type``.

    Args:
        unet, scheduler, latent, text_embeds: as in ``eval_prob_adaptive``.
        all_noise: float [N, C, h, w].
        ts: n timesteps, in [0, T).
        noise_idxs: n rows of ``all_noise``.
        text_embed_idxs: n rows of ``text_embeds``.
        batch_size: rows per forward of the network at most.
        dtype: "float32", "float16" or "bfloat16"; the network computes in its own.
        loss: "l2", "l1" or "huber".

    Returns:
        float32 [n] on the CPU, in the order of ``ts``.

    Raises:
        DiveFastError: an argument that cannot be used.
    """
    check_tensors(latent, text_embeds)
    check_noise(all_noise, latent, 1)
    check_choice("dtype", dtype, DTYPES)
    check_choice("loss", loss, NORMS)
    check_count("batch_size", batch_size)
    alphas_cumprod, target = read_scheduler(scheduler)
    limits = (len(alphas_cumprod), len(all_noise), len(text_embeds))
    names = ("ts", "noise_idxs", "text_embed_idxs")
    given = (ts, noise_idxs, text_embed_idxs)
    columns = [read_indices(*column) for column in zip(names, given, limits, strict=True)]
    if len({len(column) for column in columns}) > 1:
        raise DiveFastError(
            f"ts, noise_idxs and text_embed_idxs must be as long, got {list(map(len, columns))}."
        )
    schedule = _schedule(alphas_cumprod, _published_target(target))
    model = wrap_unet(unet, text_embeds, schedule, latent.shape[1:])
    if len(columns[0]) == 0:
        return torch.zeros(0)
    pairs, probe_ids = torch.stack(columns[:2], dim=1).unique(dim=0, return_inverse=True)
    probes = ProbeList(pairs[:, 0], all_noise, pairs[:, 1])
    grids = _grids(probe_ids.tolist(), columns[2].tolist())
    x0 = _x0(latent)
    jobs = [Job(grid, x0, _measure(grid)) for grid in grids]
    errors = torch.full((len(text_embeds), len(probes)), torch.nan)
    for finished in _run(model, jobs, probes, loss, batch_size):
        grid = finished.key
        errors[grid.prompts[:, None], grid.probe_ids] = finished.answer.trace["losses"]
    return errors[columns[2], probe_ids]


@dataclass(frozen=True, eq=False)
class _Grid:
    """Prompts that are all measured on the same probes."""

    prompts: torch.Tensor
    probe_ids: torch.Tensor


def _grids(probe_ids: list[int], prompts: list[int]) -> list[_Grid]:
    """Every (probe, prompt) asked for once, in as few grids as hold nothing else."""
    asked: dict[int, set[int]] = {}
    for probe, prompt in zip(probe_ids, prompts, strict=True):
        asked.setdefault(prompt, set()).add(probe)
    sharing: dict[tuple[int, ...], list[int]] = {}
    for prompt, ids in asked.items():
        sharing.setdefault(tuple(sorted(ids)), []).append(prompt)
    return [_Grid(torch.tensor(who), torch.tensor(ids)) for ids, who in sharing.items()]


def _measure(grid: _Grid) -> Search:
    losses = yield Losses(grid.prompts, grid.probe_ids)
    means = losses.mean(dim=1)
    count = torch.full((len(losses),), len(grid.probe_ids))
    return Answer(int(means.argmin()), means, count, {"losses": losses})


def _run(
    model: GivenUNet, jobs: list[Job], probes: ProbeList, loss: str, batch_size: int
) -> list[Finished]:
    return list(Engine(model, batch_size).run(jobs, probes, Objective(loss)))


def _measured(finished: Finished, probes: ProbeList) -> dict[int, dict[str, torch.Tensor]]:
    """What the published function calls data: timesteps and errors of every prompt."""
    losses = finished.answer.trace["losses"]
    seen = losses.isfinite()
    return {
        i: {"t": probes.timesteps[seen[i]], "pred_errors": losses[i][seen[i]]}
        for i in range(len(losses))
    }


def _schedule(alphas_cumprod: torch.Tensor, target: str) -> Schedule:
    """a_t and s_t with the roots taken in the dtype of alpha_bar, as published."""
    a, s = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
    return Schedule(a.float(), s.float(), target)


def _published_target(target: str) -> str:
    if target != "epsilon":
        warnings.warn(
            f"the published loop compares every prediction to the noise, but this scheduler says "
            f"{target}; mode='race' compares to that.",
            # Of the caller of the public function, which inference_mode wraps.
            stacklevel=4,
        )
    return "epsilon"


def _x0(latent: torch.Tensor) -> torch.Tensor:
    return latent[0].detach().float().clone()
