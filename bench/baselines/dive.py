"""Class-conditional DIVE (arXiv 2504.17253) on a ``DiTTransformer2DModel``, one image at a time.

The order of operations and of random draws is that of the published ``dive_inversion.py`` with
``--shuffle_ts --discrete_optim --accumulate_batches=1 --val_freq=1``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from bench.baselines import Run, timed
from bench.baselines.diffusion_classifier import first_channels, interval_timesteps, q_sample

METRICS = ("l2", "cosine")


@dataclass(frozen=True)
class DiveResult:
    """What one inversion saw. Loops count from 0; evaluations are rows (image, probe, condition).

    Attributes:
        pred: the class, ``nearest[best_loop]``.
        monitor_losses: per loop, the loss of the projected embedding over all probes.
        train_losses: per optimisation step.
        nearest: per loop, the class nearest to the embedding when the loop ended.
        best_loop: the first loop with the lowest monitor loss.
        initial_embedding: [1, D] float32.
        embeddings: [n_loops, D] float32, the (unprojected) embedding when each loop ended.
        n_forward: rows sent through the transformer, monitor passes included.
        n_backward: rows whose gradient was taken.
    """

    pred: int
    monitor_losses: list[float]
    train_losses: list[float]
    nearest: list[int]
    best_loop: int
    initial_embedding: Tensor
    embeddings: Tensor
    n_forward: int
    n_backward: int


def noise_table(shape: tuple[int, int, int], seed: int = 42, n: int = 1024) -> Tensor:
    """The noises that all images share: [n, C, h, w] float32 from the global CPU generator."""
    torch.manual_seed(seed)
    return torch.randn(n, *shape)


class _GivenVectors(nn.Module):
    """Stands in for a label embedder and answers with the vectors [N, D] it was given."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, labels: Tensor | None) -> Tensor:
        return self.vectors


@contextmanager
def _class_vectors(transformer: DiTTransformer2DModel, vectors: Tensor) -> Iterator[None]:
    """Every block, and the final layer through block 0, reads the given vectors [N, D]."""
    embedders = [block.norm1.emb for block in transformer.transformer_blocks]
    # Blocks may share one embedder, so all originals are taken before the first is replaced.
    originals = [embedder.class_embedder for embedder in embedders]
    try:
        for embedder in embedders:
            embedder.class_embedder = _GivenVectors(vectors)
        yield
    finally:
        for embedder, original in zip(embedders, originals, strict=True):
            embedder.class_embedder = original


def predict_with_vectors(
    transformer: DiTTransformer2DModel, x_t: Tensor, t: Tensor, vectors: Tensor
) -> Tensor:
    """The model's own forward with class vectors [N, D] in place of integer labels.

    x_t [N, C, h, w], t [N] int64; returns [N, C or 2C, h, w]. Differentiable in the vectors.
    """
    with _class_vectors(transformer, vectors):
        return transformer(x_t, t).sample


def nearest_class(v: Tensor, table: Tensor, metric: str) -> Tensor:
    """The row of table [V, D] nearest to each of v [N, D]: int64 [N]."""
    if metric == "l2":
        distance = torch.cdist(v, table, p=2, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        unit_v = v / v.norm(dim=-1, keepdim=True)
        unit_table = table / table.norm(dim=-1, keepdim=True)
        distance = 1 - unit_v @ unit_table.T
    return distance.argmin(dim=-1)


def project(v: Tensor, table: Tensor, metric: str) -> Tensor:
    """Straight-through projection v + (P(v) - v).detach(): P(v) forward, the identity backward."""
    nearest_row = table[nearest_class(v.detach(), table, metric)]
    return v + (nearest_row - v).detach()


def initial_embedding(table: Tensor) -> Tensor:
    """randn(1, D) * std + mean, with the scalar mean and std of table [V + 1, D].

    The table includes the unconditional row; the draw is the global CPU generator's.
    """
    mean, std = table.mean().item(), table.std().item()
    return torch.randn(1, table.shape[1]) * std + mean


def invert(
    transformer: DiTTransformer2DModel,
    x0: Tensor,
    alphas_cumprod: Tensor,
    noises: Tensor,
    *,
    t_interval: int = 4,
    n_loops: int = 20,
    lr: float = 1e-2,
    batch_size: int = 25,
    metric: str = "l2",
    seed: int = 0,
) -> DiveResult:
    """argmin_v of E_{t, eps} || eps - eps_theta(x_t, t, P(v)) ||^2 by AdamW, then the class of v.

    Args:
        x0: [1, C, h, w] float32.
        alphas_cumprod: [T].
        noises: [>= K, C, h, w], K = T // t_interval, the i-th for the i-th timestep.
        batch_size: probes per optimisation step; divides K.
        metric: of the projection and of the answer, ``"l2"`` or ``"cosine"``.
        seed: of the *global* generators of random, numpy and torch, as in the script.
    """
    ts = interval_timesteps(len(alphas_cumprod), t_interval).to(x0.device)
    _check(transformer, x0, len(ts), noises, batch_size, metric)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

    noises = noises[: len(ts)].to(x0.device)
    ts_val, noises_val = ts.clone(), noises.clone()
    label_embedder = transformer.transformer_blocks[0].norm1.emb.class_embedder
    full_table = label_embedder.embedding_table.weight.detach()
    table = full_table[: label_embedder.num_classes]
    first = initial_embedding(full_table)
    embedding = nn.Parameter(first.to(x0.device, copy=True))
    optimizer = torch.optim.AdamW([embedding], lr=lr)

    def batch_loss(batch_ts: Tensor, eps: Tensor) -> Tensor:
        x_t = q_sample(x0.repeat(len(batch_ts), 1, 1, 1), batch_ts, eps, alphas_cumprod)
        vectors = project(embedding, table, metric).repeat(len(batch_ts), 1)
        prediction = predict_with_vectors(transformer, x_t, batch_ts, vectors)
        return F.mse_loss(first_channels(prediction, x0.shape[1]), eps)

    train_losses, monitor_losses, nearest, embeddings = [], [], [], []
    best_loop, best_loss = -1, np.inf
    n_forward = n_backward = 0
    for loop in range(n_loops):
        # Composed with the permutations of the loops before, as the script does.
        permutation = torch.randperm(len(ts)).to(x0.device)
        ts, noises = ts[permutation], noises[permutation]
        for i in range(0, len(ts), batch_size):
            loss = batch_loss(ts[i : i + batch_size], noises[i : i + batch_size])
            # Gradient of the embedding alone, whether or not the caller froze the weights.
            loss.backward(inputs=[embedding])
            optimizer.step()
            optimizer.zero_grad()
            train_losses.append(loss.item())
            n_forward, n_backward = n_forward + batch_size, n_backward + batch_size

        with torch.no_grad():
            batch_losses = []
            for i in range(0, len(ts_val), batch_size):
                loss = batch_loss(ts_val[i : i + batch_size], noises_val[i : i + batch_size])
                batch_losses.append(loss.item())
                n_forward += batch_size
            monitor_losses.append(float(np.mean(batch_losses)))
            nearest.append(nearest_class(embedding, table, metric).item())
            embeddings.append(embedding.detach().cpu().clone())
        if monitor_losses[-1] < best_loss:
            best_loop, best_loss = loop, monitor_losses[-1]

    assert best_loop >= 0, f"expected a finite monitor loss, got {monitor_losses}."
    return DiveResult(
        pred=nearest[best_loop],
        monitor_losses=monitor_losses,
        train_losses=train_losses,
        nearest=nearest,
        best_loop=best_loop,
        initial_embedding=first,
        embeddings=torch.cat(embeddings),
        n_forward=n_forward,
        n_backward=n_backward,
    )


def run(
    transformer: DiTTransformer2DModel,
    x0: Tensor,
    alphas_cumprod: Tensor,
    noises: Tensor,
    **settings,
) -> Run:
    """``invert`` and what it cost; arguments as there. The noises are the same for all images."""
    result, seconds = timed(lambda: invert(transformer, x0, alphas_cumprod, noises, **settings))
    return Run(result.pred, result.n_forward + result.n_backward, seconds)


def _check(
    transformer: DiTTransformer2DModel,
    x0: Tensor,
    n_probes: int,
    noises: Tensor,
    batch_size: int,
    metric: str,
) -> None:
    assert x0.ndim == 4 and len(x0) == 1, (
        f"x0 must be one image [1, C, h, w], got {list(x0.shape)}."
    )
    assert len(noises) >= n_probes, f"expected at least {n_probes} noises, got {len(noises)}."
    assert n_probes % batch_size == 0, (
        f"batch_size must divide the {n_probes} probes, got {batch_size}."
    )
    assert metric in METRICS, f"metric must be one of {METRICS}, got {metric!r}."
    assert not transformer.training, "the transformer must be in eval mode, got training mode."
    tables = [
        block.norm1.emb.class_embedder.embedding_table.weight
        for block in transformer.transformer_blocks
    ]
    assert all(torch.equal(table, tables[0]) for table in tables), (
        "every block must hold the same label table, as the original DiT has one, got different "
        "tables."
    )
