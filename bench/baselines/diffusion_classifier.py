"""Diffusion Classifier (arXiv 2303.16203) on a class-conditional ``DiTTransformer2DModel``.

The order of operations and of random draws is that of the published ``eval_prob_adaptive.py`` and
``eval_prob_dit.py``; the condition is the model's integer label. One image at a time, float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor

from bench.baselines import Run, timed

POINTWISE_LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


def interval_timesteps(n_timesteps: int, t_interval: int) -> Tensor:
    """t_interval // 2, then every t_interval-th timestep: int64 [T // t_interval]."""
    assert n_timesteps % t_interval == 0, (
        f"t_interval must divide the {n_timesteps} timesteps, got {t_interval}."
    )
    return torch.arange(t_interval // 2, n_timesteps, t_interval)


def q_sample(x0: Tensor, t: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps.

    x0 and eps [B, C, h, w] float32, t [B] int64, alphas_cumprod [T]. The roots are taken in float64
    and rounded to float32 once gathered, as the original DiT's diffusion does.
    """
    alpha_bar = alphas_cumprod.double()
    index = t.to(alpha_bar.device)
    a = alpha_bar.sqrt()[index].float().view(-1, 1, 1, 1).to(x0.device)
    s = (1.0 - alpha_bar).sqrt()[index].float().view(-1, 1, 1, 1).to(x0.device)
    return a * x0 + s * eps


def first_channels(prediction: Tensor, channels: int) -> Tensor:
    """The eps of a prediction [B, C or 2C, h, w]; learned sigma puts its variance behind."""
    return torch.split(prediction, channels, dim=1)[0]


def eval_prob_all(
    transformer: DiTTransformer2DModel,
    x0: Tensor,
    n_classes: int,
    alphas_cumprod: Tensor,
    noises: Tensor,
    t_interval: int,
    *,
    batch_size: int = 32,
) -> Tensor:
    """Full enumeration, one class after another: the errors [n_classes, K], float32, on the CPU.

    K = T // t_interval. x0 [1, C, h, w]; noises [>= K, C, h, w], one per timestep
    (``eval_prob_dit.py --randomize_noise``). The answer is ``errors.mean(dim=1).argmin()``.
    """
    _check_image(transformer, x0)
    ts = interval_timesteps(len(alphas_cumprod), t_interval)
    assert len(noises) >= len(ts), f"expected at least {len(ts)} noises, got {len(noises)}."
    return torch.stack(
        [
            _eval_prob(transformer, x0, label, alphas_cumprod, ts, noises, batch_size)
            for label in range(n_classes)
        ]
    )


def _eval_prob(
    transformer: DiTTransformer2DModel,
    x0: Tensor,
    label: int,
    alphas_cumprod: Tensor,
    ts: Tensor,
    noises: Tensor,
    batch_size: int,
) -> Tensor:
    """The errors [K] of one class."""
    pred_errors = torch.zeros(len(ts))
    with torch.inference_mode():
        for i in range(0, len(ts), batch_size):
            batch_ts = ts[i : i + batch_size].to(x0.device)
            eps = noises[i : i + len(batch_ts)].to(x0.device)
            x_t = q_sample(x0.repeat(len(batch_ts), 1, 1, 1), batch_ts, eps, alphas_cumprod)
            labels = torch.full_like(batch_ts, label)
            prediction = transformer(x_t, batch_ts, labels).sample
            error = F.mse_loss(eps, first_channels(prediction, x0.shape[1]), reduction="none")
            pred_errors[i : i + len(batch_ts)] = error.mean(dim=(1, 2, 3)).cpu()
    return pred_errors


def all_timesteps(n_timesteps: int, max_samples: int) -> list[int]:
    """The timesteps that the stages draw from, evenly spaced: max_samples of them."""
    step = n_timesteps // max_samples
    return list(range(step // 2, n_timesteps, step))[:max_samples]


def stage_timesteps(t_to_eval: list[int], n_samples: int) -> list[int]:
    """n_samples timesteps taken evenly from t_to_eval, earlier stages' timesteps included."""
    stride = len(t_to_eval) // n_samples
    return t_to_eval[stride // 2 :: stride][:n_samples]


def eval_prob_adaptive(
    transformer: DiTTransformer2DModel,
    x0: Tensor,
    n_classes: int,
    alphas_cumprod: Tensor,
    *,
    n_samples: Sequence[int],
    to_keep: Sequence[int],
    n_trials: int = 1,
    batch_size: int = 32,
    loss: str = "l2",
    all_noise: Tensor | None = None,
    seed: int | None = None,
) -> tuple[int, dict[int, dict[str, Tensor]]]:
    """Stages of enumeration, each on more timesteps and for the classes that the last one kept.

    Args:
        x0: [1, C, h, w] float32.
        alphas_cumprod: [T] float32.
        n_samples: timesteps evaluated by the end of each stage.
        to_keep: classes that each stage keeps; the last is 1.
        n_trials: noises per timestep.
        loss: ``"l2"``, ``"l1"`` or ``"huber"``, averaged over the image.
        all_noise: [>= max(n_samples) * n_trials, C, h, w]; drawn on x0's device when None.
        seed: of the global generator, set before the noise is drawn; None leaves it as it is.

    Returns:
        The class, and for every class the timesteps ``"t"`` [n] and errors ``"pred_errors"`` [n] in
        the order of evaluation.
    """
    _check_image(transformer, x0)
    _check_stages(n_samples, to_keep, loss)
    n_noises = max(n_samples) * n_trials
    if seed is not None:
        torch.manual_seed(seed)
    if all_noise is None:
        all_noise = torch.randn((n_noises, *x0.shape[1:]), device=x0.device)
    assert len(all_noise) >= n_noises, f"expected {n_noises} noises, got {len(all_noise)}."

    data: dict[int, dict[str, Tensor]] = {}
    evaluated: set[int] = set()
    remaining = list(range(n_classes))
    t_to_eval = all_timesteps(len(alphas_cumprod), max(n_samples))
    for n, n_to_keep in zip(n_samples, to_keep, strict=True):
        new = [t for t in stage_timesteps(t_to_eval, n) if t not in evaluated]
        ts, noise_idxs, labels = stage_requests(remaining, new, len(evaluated), n_trials)
        evaluated.update(new)
        errors = _eval_error(
            transformer, x0, alphas_cumprod, all_noise, ts, noise_idxs, labels, batch_size, loss
        )
        append_stage(data, remaining, ts, labels, errors)
        scores = torch.tensor([-data[label]["pred_errors"].mean() for label in remaining])
        best = torch.topk(scores, k=n_to_keep).indices.tolist()
        remaining = [remaining[i] for i in best]
    return remaining[0], data


def stage_requests(
    remaining: list[int], new: list[int], n_evaluated: int, n_trials: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps, noise indices and labels of one stage, class after class.

    The noise index counts timesteps in the order in which they were evaluated.
    """
    rows = [
        (t, n_trials * position + trial, label)
        for label in remaining
        for position, t in enumerate(new, start=n_evaluated)
        for trial in range(n_trials)
    ]
    ts, noise_idxs, labels = torch.tensor(rows, dtype=torch.long).view(-1, 3).unbind(dim=1)
    return ts, noise_idxs, labels


def _eval_error(
    transformer: DiTTransformer2DModel,
    x0: Tensor,
    alphas_cumprod: Tensor,
    all_noise: Tensor,
    ts: Tensor,
    noise_idxs: Tensor,
    labels: Tensor,
    batch_size: int,
    loss: str,
) -> Tensor:
    """The error of every request, [n], on the CPU. Roots in the dtype of alphas_cumprod."""
    alpha_bar = alphas_cumprod.to(x0.device)
    pred_errors = torch.zeros(len(ts))
    with torch.inference_mode():
        for i in range(0, len(ts), batch_size):
            t = ts[i : i + batch_size].to(x0.device)
            eps = all_noise[noise_idxs[i : i + batch_size]].to(x0.device)
            a = (alpha_bar[t] ** 0.5).view(-1, 1, 1, 1)
            s = ((1 - alpha_bar[t]) ** 0.5).view(-1, 1, 1, 1)
            x_t = x0 * a + eps * s
            prediction = transformer(x_t, t, labels[i : i + batch_size].to(x0.device)).sample
            eps_theta = first_channels(prediction, x0.shape[1])
            error = POINTWISE_LOSSES[loss](eps, eps_theta, reduction="none").mean(dim=(1, 2, 3))
            pred_errors[i : i + len(t)] = error.cpu()
    return pred_errors


def append_stage(
    data: dict[int, dict[str, Tensor]],
    remaining: list[int],
    ts: Tensor,
    labels: Tensor,
    errors: Tensor,
) -> None:
    """Adds one stage's timesteps and errors to what each remaining class already has."""
    for label in remaining:
        mask = labels == label
        stage = {"t": ts[mask], "pred_errors": errors[mask]}
        earlier = data.get(label)
        if earlier is not None:
            stage = {key: torch.cat([earlier[key], stage[key]]) for key in stage}
        data[label] = stage


def run_all(
    transformer: DiTTransformer2DModel,
    x0: Tensor,
    n_classes: int,
    alphas_cumprod: Tensor,
    noises: Tensor,
    t_interval: int,
    **settings,
) -> Run:
    """``eval_prob_all``, the answer from its errors, and what it cost; arguments as there."""
    arguments = (transformer, x0, n_classes, alphas_cumprod, noises, t_interval)
    errors, seconds = timed(lambda: eval_prob_all(*arguments, **settings))
    return Run(int(errors.mean(dim=1).argmin()), errors.numel(), seconds)


def run_adaptive(
    transformer: DiTTransformer2DModel,
    x0: Tensor,
    n_classes: int,
    alphas_cumprod: Tensor,
    **settings,
) -> Run:
    """``eval_prob_adaptive`` and what it cost; arguments as there."""
    arguments = (transformer, x0, n_classes, alphas_cumprod)
    (pred, data), seconds = timed(lambda: eval_prob_adaptive(*arguments, **settings))
    return Run(pred, n_evaluations(data), seconds)


def n_evaluations(data: dict[int, dict[str, Tensor]]) -> int:
    """Rows that were sent through the network for the data of ``eval_prob_adaptive``."""
    return sum(len(measured["t"]) for measured in data.values())


def _check_image(transformer: DiTTransformer2DModel, x0: Tensor) -> None:
    assert x0.ndim == 4 and len(x0) == 1, (
        f"x0 must be one image [1, C, h, w], got {list(x0.shape)}."
    )
    # In training mode diffusers drops labels at random, in every block for itself.
    assert not transformer.training, "the transformer must be in eval mode, got training mode."


def _check_stages(n_samples: Sequence[int], to_keep: Sequence[int], loss: str) -> None:
    assert len(n_samples) == len(to_keep), (
        f"n_samples and to_keep must be as long, got {len(n_samples)} and {len(to_keep)}."
    )
    assert to_keep[-1] == 1, f"the last stage must keep 1 class, got {to_keep[-1]}."
    assert loss in POINTWISE_LOSSES, f"loss must be one of {list(POINTWISE_LOSSES)}, got {loss!r}."
