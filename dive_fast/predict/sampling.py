"""Images from the model itself, by deterministic DDIM (arXiv 2010.02502, equation 12, eta = 0).

    x_t = a_t x0 + s_t eps      read from the prediction: x0 and eps
    x_t' = a_t' x0 + s_t' eps   at the next lower timestep t'

Works on ``Schedule`` factors, for every target, where diffusers' schedulers want their own betas.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from tqdm import tqdm

from dive_fast.core.numbers import is_whole, whole_seed
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.engine.batch_size import rows_per_batch
from dive_fast.engine.model_checks import check_model, checked
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.protocol import Model
from dive_fast.predict.arguments import as_rows, is_finite


def sample(
    model: Model,
    classes: Any,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """One latent of each class asked for.

    Where an answer is several conditions (``average="loss"``), the latents of a class take them in
    turn, from the first: six images of a class with three prompts are two of each.

    Args:
        classes: whole numbers [N], rows of the vocabulary.
        steps: timesteps, spread evenly from T - 1 to 0.
        guidance: of the classifier-free kind, eps_0 + guidance (eps_c - eps_0); 1 is without it,
            else it costs a second forward and needs an unconditional embedding.
        seed: of the starting noise, drawn on the CPU one latent at a time, so that the first n of
            a longer list are the same latents.
        batch_size: rows per forward at most; the model's default if None (see ``rows_per_batch``).
        progress: show a bar.

    Returns:
        x0, float32 [N, C, h, w], on the CPU.

    Raises:
        DiveFastError: classes, steps or batch size out of range.
        ModelError: guidance without an unconditional embedding, or a prediction that is not finite.
    """
    check_model(model)
    vocabulary, n_timesteps = model.vocabulary, len(model.schedule)
    index, seed = as_rows(classes, len(vocabulary)), whole_seed(seed)
    if not is_whole(steps, 1) or steps > n_timesteps:
        raise DiveFastError(f"steps must lie in [1, {n_timesteps}], got {shown(steps)}.")
    if not is_finite(guidance):
        raise DiveFastError(f"guidance must be a finite number, got {shown(guidance)}.")
    batch_size = rows_per_batch(model, batch_size)
    if guidance != 1 and vocabulary.unconditional is None:
        raise ModelError(f"{model.name} has no unconditional embedding for guidance {guidance}.")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(model.latent_shape, generator=generator) for _ in index])
    timesteps = torch.linspace(n_timesteps - 1, 0, steps).round().long().tolist()
    rows = batch_size if guidance == 1 else max(1, batch_size // 2)
    conditions = _conditions(vocabulary, index.tolist())
    chunks = list(zip(noise.split(rows), conditions.split(rows), strict=True))
    bar = tqdm(total=len(chunks) * steps, disable=not progress, unit="step", desc="generate")
    with torch.no_grad(), bar:
        parts = [
            _denoise(model, x_t.to(model.device), c.to(model.device), timesteps, guidance, bar)
            for x_t, c in chunks
        ]
    x0 = torch.cat(parts).cpu()
    if not torch.isfinite(x0).all():
        raise ModelError(f"{model.name} generates NaN or infinity in {model.dtype}.")
    return x0


def _conditions(vocabulary: Vocabulary, classes: list[int]) -> torch.Tensor:
    """What the network is given for each class, [N, D / parts]."""
    asked: Counter[int] = Counter()
    turns = []
    for c in classes:
        turns.append(asked[c] % vocabulary.parts)
        asked[c] += 1
    parts = vocabulary.table.unflatten(1, (vocabulary.parts, -1))
    return parts[classes, turns].float()


def _denoise(
    model: Model,
    x_t: torch.Tensor,
    condition: torch.Tensor,
    timesteps: list[int],
    guidance: float,
    bar: tqdm,
) -> torch.Tensor:
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        prediction = _predict(model, x_t, t, condition, guidance)
        x0, eps = _split(model, x_t, t, prediction)
        bar.update()
        if following is None:
            return x0
        x_t = model.schedule.a[following] * x0 + model.schedule.s[following] * eps


def _predict(
    model: Model, x_t: torch.Tensor, t: int, condition: torch.Tensor, guidance: float
) -> torch.Tensor:
    """The network's output without learned variances, float32 [N, C, h, w]."""
    n = len(x_t)
    if guidance == 1:
        given = checked(model, "predict", x_t, torch.full((n,), t, device=x_t.device), condition)
        return given[:, : x_t.shape[1]].float()
    # Every part of it is the same "no condition".
    unconditional = model.vocabulary.unconditional[: condition.shape[1]].to(condition)
    both = checked(
        model,
        "predict",
        torch.cat([x_t, x_t]),
        torch.full((2 * n,), t, device=x_t.device),
        torch.cat([unconditional.expand_as(condition), condition]),
    )
    without, given = both[:, : x_t.shape[1]].float().chunk(2)
    return without + guidance * (given - without)


def _split(
    model: Model, x_t: torch.Tensor, t: int, prediction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and eps as the prediction has them; the targets are those of ``ops``."""
    a, s = model.schedule.a[t], model.schedule.s[t]
    match model.schedule.target:
        case "epsilon":
            return (x_t - s * prediction) / a, prediction
        case "v_prediction":  # v = a eps - s x0 with a^2 + s^2 = 1
            return a * x_t - s * prediction, s * x_t + a * prediction
        case "sample":
            return prediction, (x_t - a * prediction) / s
        case "flow":  # eps - x0
            x0 = (x_t - s * prediction) / (a + s)
            return x0, x0 + prediction
    raise ModelError(f"{model.name} predicts {model.schedule.target!r}, which cannot be sampled.")
