"""What the published functions are called with, checked: one sentence for whatever is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from dive_fast.compat.capped_race import CappedRace
from dive_fast.core.numbers import is_whole
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.schedule import TARGETS
from dive_fast.engine.objective import NORMS
from dive_fast.errors import DiveFastError
from dive_fast.models import DTYPES
from dive_fast.strategies import AdaptiveEnumerate

# The published script takes T from a table of its own: 1000 for each of these.
PUBLISHED_VERSIONS = ("1-1", "1-2", "1-3", "1-4", "1-5", "2-0", "2-1")
PUBLISHED_T = 1000


@dataclass(frozen=True)
class Settings:
    """What the published functions read from ``args``."""

    n_samples: tuple[int, ...]
    to_keep: tuple[int, ...]
    n_trials: int
    batch_size: int
    dtype: str
    loss: str
    version: str | None

    @classmethod
    def read(cls, args: Any) -> Settings:
        required = ("n_samples", "to_keep", "n_trials", "batch_size", "dtype", "loss")
        missing = [name for name in required if not hasattr(args, name)]
        if missing:
            raise DiveFastError(
                f"args must have {', '.join(required)}, got {type(args).__name__} without "
                f"{', '.join(missing)}."
            )
        for name in ("n_samples", "to_keep"):
            numbers = getattr(args, name)
            whole = isinstance(numbers, list | tuple) and all(is_whole(n, 1) for n in numbers)
            if not whole or len(numbers) == 0:
                raise DiveFastError(
                    f"args.{name} must list whole numbers of at least 1, got {numbers!r}."
                )
        for name in ("n_trials", "batch_size"):
            check_count(f"args.{name}", getattr(args, name))
        check_choice("args.dtype", args.dtype, DTYPES)
        check_choice("args.loss", args.loss, NORMS)
        version = getattr(args, "version", None)
        if version is not None:
            check_choice("args.version", version, PUBLISHED_VERSIONS)
        return cls(
            tuple(args.n_samples),
            tuple(args.to_keep),
            args.n_trials,
            args.batch_size,
            args.dtype,
            args.loss,
            version,
        )

    def stages(self, n_prompts: int) -> AdaptiveEnumerate:
        """The published stages as a strategy."""
        limits = (n_prompts, *self.to_keep)
        for limit, keep in zip(limits, self.to_keep, strict=False):
            if keep > limit:
                raise DiveFastError(
                    f"args.to_keep must keep at most what is left ({limit} prompts), got {keep}."
                )
        return AdaptiveEnumerate(self.n_samples, self.to_keep, self.n_trials, self.loss)

    def race(self) -> CappedRace:
        """The race that drops prompts at the latest where the published stages do."""
        ends = accumulate((n * self.n_trials for n in self.n_samples), max)
        # Of stages that end together the last one counts.
        return CappedRace(tuple(dict(zip(ends, self.to_keep, strict=True)).items()))

    def timesteps(self, stages: AdaptiveEnumerate, n_schedule: int, paper: bool) -> torch.Tensor:
        """t of every probe in the order of measuring, int64 [K]; noises are taken in turn.

        The stages' own order, or for the race the same timesteps in low-discrepancy order.
        """
        n_timesteps = n_schedule if self.version is None else PUBLISHED_T
        if n_timesteps > n_schedule:
            raise DiveFastError(
                f"version {self.version} has {n_timesteps} timesteps, got a scheduler of "
                f"{n_schedule}."
            )
        if paper:
            return stages.probes(None, n_timesteps, (1, 1, 1), 0).timesteps
        n = max(self.n_samples)
        if n > n_timesteps:
            raise DiveFastError(
                f"args.n_samples may ask for at most {n_timesteps} timesteps, got {n}."
            )
        step = n_timesteps // n
        # Ranks of the van der Corput sequence: each timestep once, every prefix evenly spread.
        sequence = low_discrepancy_probes(n, 2**24, (1, 1, 1)).timesteps
        order = sequence.argsort().argsort()
        return (step // 2 + step * order).repeat_interleave(self.n_trials)


def read_scheduler(scheduler: Any) -> tuple[torch.Tensor, str]:
    """alpha_bar [T] on the CPU, in the dtype it has, and the prediction type."""
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas_cumprod, torch.Tensor) or alphas_cumprod.ndim != 1:
        raise DiveFastError(
            f"expected a scheduler with alphas_cumprod [T], got {type(scheduler).__name__}."
        )
    config = getattr(scheduler, "config", None)
    target = getattr(config, "prediction_type", "epsilon")
    check_choice("the scheduler's prediction_type", target, TARGETS)
    return alphas_cumprod.detach().cpu(), target


def check_tensors(latent: torch.Tensor, text_embeds: torch.Tensor) -> None:
    for name, tensor, ndim, shape in (
        ("latent", latent, 4, "[1, C, h, w]"),
        ("text_embeds", text_embeds, 3, "[P, L, D]"),
    ):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise DiveFastError(f"{name} must be a float tensor {shape}, got {got}.")
        one = name == "text_embeds" or tensor.shape[:1] == (1,)
        if tensor.ndim != ndim or tensor.numel() == 0 or not one:
            raise DiveFastError(f"{name} must have shape {shape}, got {list(tensor.shape)}.")
        if not tensor.isfinite().all():
            raise DiveFastError(f"{name} must be finite, got NaN or infinity.")


def check_noise(all_noise: torch.Tensor, latent: torch.Tensor, n: int) -> None:
    shape = list(all_noise.shape) if isinstance(all_noise, torch.Tensor) else None
    if shape is None or shape[1:] != list(latent.shape[1:]) or shape[0] < n:
        got = type(all_noise).__name__ if shape is None else shape
        expected = ", ".join(map(str, latent.shape[1:]))
        raise DiveFastError(f"all_noise must have shape [N >= {n}, {expected}], got {got}.")


def check_count(name: str, number: Any) -> None:
    if not is_whole(number, 1):
        raise DiveFastError(f"{name} must be a whole number of at least 1, got {number!r}.")


def check_choice(name: str, choice: Any, known: Sequence[str]) -> None:
    if choice not in known:
        raise DiveFastError(f"{name} must be one of {', '.join(known)}, got {choice!r}.")


def read_indices(name: str, given: Sequence[int], limit: int) -> torch.Tensor:
    index = torch.as_tensor(given)
    if index.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise DiveFastError(
            f"{name} must be a list of whole numbers, got {index.dtype} of shape "
            f"{list(index.shape)}."
        )
    if int(index.min()) < 0 or int(index.max()) >= limit:
        raise DiveFastError(
            f"{name} must lie in [0, {limit}), got values from {int(index.min())} to "
            f"{int(index.max())}."
        )
    return index.long().cpu()
