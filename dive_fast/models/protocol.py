"""What every model family looks like from outside (the idea is k-diffusion's)."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from dive_fast.schedule import Schedule
from dive_fast.vocabulary import Vocabulary


@runtime_checkable
class Model(Protocol):
    """A frozen conditional diffusion model.

    A model may also have ``timesteps``, a ``TimestepWeights`` or None, which the strategies' probes
    then follow.

    Attributes:
        name: what the user called it.
        schedule: the noise schedule it was trained with.
        vocabulary: the embeddings of its possible answers.
        latent_shape: (C, h, w) of x0.
        image_shape: (channels, size, size) of the pictures that ``encode`` takes.
        device: where it computes.
        dtype: what it computes in.
        beta: inverse temperature of log p(y | x0) = -beta L + log p(y).
    """

    name: str
    schedule: Schedule
    vocabulary: Vocabulary
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    beta: float

    def identity(self) -> dict[str, Any]:
        """What tells this model from another, for JSON; a run is only resumed on the same."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures [B, channels, size, size] in [-1, 1] to x0, float32 [B, C, h, w]."""
        ...

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The network: x_t [M, C, h, w], t int64 [M], condition [M, D] to [M, C or 2C, h, w].

        Differentiable in ``condition``.
        """
        ...
