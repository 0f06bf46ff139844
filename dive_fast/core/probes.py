"""Probes: the fixed list of (timestep, noise) pairs on which every condition is judged.

All images and all conditions share one list (common random numbers), so that differences between
conditions are paired. Lists are drawn on the CPU: the same on every device, for every batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import qmc

from dive_fast.core.numbers import whole, whole_seed
from dive_fast.errors import DiveFastError, shown

# Their noises are all in memory.
MOST_PROBES = 1_000_000


@dataclass(frozen=True)
class ProbeList:
    """K probes over a table of noises.

    Attributes:
        timesteps: int64 [K], t_k.
        noise: float32 [N, C, h, w].
        noise_index: int64 [K], the row of ``noise`` that is eps_k; counts 0, 1, 2, ... if left out.
        weights: float32 [K], w_k, multiplied into each probe's loss; None stands for ones.
        unit: probes that stand for one independent draw, in their order: 2 where eps and -eps come
            in pairs. Statistics take their variance between units.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    noise_index: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    unit: int = 1

    def __post_init__(self) -> None:
        whole("unit", self.unit, 1)
        t, noise = _tensor("timesteps", self.timesteps), _tensor("noise", self.noise)
        if t.ndim != 1 or len(t) == 0 or not _is_whole(t):
            raise DiveFastError(
                f"timesteps must be whole numbers of shape [K] with K >= 1, "
                f"got {t.dtype} of shape {list(t.shape)}."
            )
        index = torch.arange(len(t)) if self.noise_index is None else self.noise_index
        index = _tensor("noise_index", index)
        if not _is_whole(index):
            raise DiveFastError(f"noise_index must be whole numbers, got {index.dtype}.")
        index = index.long()
        if index.shape != t.shape:
            raise DiveFastError(
                f"noise_index must have the shape of timesteps, {list(t.shape)}, "
                f"got {list(index.shape)}."
            )
        if noise.ndim != 4 or len(noise) <= int(index.max()) or int(index.min()) < 0:
            raise DiveFastError(
                f"noise must have shape [N, C, h, w] with N > {int(index.max())}, "
                f"got {list(noise.shape)}."
            )
        if not torch.isfinite(noise).all():
            raise DiveFastError("noise must be finite, got NaN or infinity.")
        if self.weights is not None:
            weights = _tensor("weights", self.weights).float().cpu()
            if weights.shape != t.shape:
                raise DiveFastError(
                    f"weights must have the shape of timesteps, {list(t.shape)}, "
                    f"got {list(weights.shape)}."
                )
            if not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not weights.any():
                raise DiveFastError("weights must be finite, at least 0, and not all 0.")
            object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "timesteps", t.long().cpu())
        object.__setattr__(self, "noise", noise.float().cpu())
        object.__setattr__(self, "noise_index", index.cpu())

    def __len__(self) -> int:
        return len(self.timesteps)

    def check(self, shape: tuple[int, ...], n_timesteps: int) -> None:
        """Raises DiveFastError unless the list suits latents [C, h, w] and timesteps in [0, T)."""
        if tuple(self.noise.shape[1:]) != tuple(shape):
            raise DiveFastError(
                f"the probes' noise must have shape [N, {', '.join(map(str, shape))}], "
                f"got {list(self.noise.shape)}."
            )
        low, high = int(self.timesteps.min()), int(self.timesteps.max())
        if low < 0 or high >= n_timesteps:
            raise DiveFastError(
                f"timesteps must lie in [0, {n_timesteps}), got values from {low} to {high}."
            )


def _tensor(name: str, values: object) -> torch.Tensor:
    """A dense tensor of real numbers."""
    try:
        tensor = torch.as_tensor(values)
    # Whatever torch meets in texts, objects, ragged lists and numbers beyond its own.
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DiveFastError(f"{name} must hold numbers, got {shown(values)}.") from error
    if tensor.layout != torch.strided or tensor.is_complex():
        raise DiveFastError(f"{name} must be a dense tensor of real numbers, got {tensor.dtype}.")
    return tensor


def _is_whole(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype != torch.bool


def low_discrepancy_probes(
    k: int, n_timesteps: int, shape: tuple[int, ...], seed: int = 0, antithetic: bool = True
) -> ProbeList:
    """K probes whose timesteps follow the van der Corput sequence, with noises in pairs eps, -eps.

    Every prefix covers the timesteps evenly, and a shorter list is a prefix of a longer one, so a
    strategy may stop anywhere. What is odd in eps nearly cancels within a pair (antithetic
    variates), though its two timesteps differ.

    Args:
        k: number of probes.
        n_timesteps: T of the schedule.
        shape: of a latent, (C, h, w).
        seed: of the noises.
        antithetic: False gives every probe a noise of its own.
    """
    k, seed = check_count(k), whole_seed(seed)
    # Index 0 would be t = 0, where every condition explains the noise equally badly.
    timesteps = [int(u * n_timesteps) for u in van_der_corput(k)]
    generator = torch.Generator().manual_seed(seed)
    unit = 2 if antithetic else 1
    # One draw per unit: a single draw of [k, ...] would not be a prefix of a longer one.
    drawn = [torch.randn(shape, generator=generator) for _ in range(-(-k // unit))]
    noise = torch.stack([drawn[i // unit] * (-1) ** (i % unit) for i in range(k)])
    return ProbeList(torch.tensor(timesteps), noise, unit=unit)


def published_probes(
    k: int, n_timesteps: int, shape: tuple[int, ...], seed: int = 42, n_noises: int = 1024
) -> ProbeList:
    """The list of the published scripts: t = i//2, i//2 + i, ... with the interval i = T / K.

    The noises are the first K of ``torch.manual_seed(seed); torch.randn(n_noises, C, h, w)``.

    Raises:
        DiveFastError: K does not divide T, or exceeds the number of noises.
    """
    k, seed = check_count(k), whole_seed(seed)
    if n_timesteps % k or k > n_noises:
        raise DiveFastError(
            f"the published probe list needs a number of probes that divides {n_timesteps} "
            f"and is at most {n_noises}, got {k}."
        )
    interval = n_timesteps // k
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((n_noises, *shape), generator=generator)[:k].clone()
    return ProbeList(torch.arange(interval // 2, n_timesteps, interval), noise)


def check_count(k: object) -> int:
    """A number of probes.

    Raises:
        DiveFastError: it is none, or out of range.
    """
    return whole("the number of probes", k, 1, MOST_PROBES)


def van_der_corput(k: int) -> list[float]:
    """The terms 1 to k of the sequence in base 2, without its first, 0: 1/2, 1/4, 3/4, 1/8, ..."""
    return qmc.Halton(1, scramble=False).random(k + 1)[1:, 0].tolist()
