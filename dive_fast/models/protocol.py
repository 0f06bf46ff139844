"""What every model family looks like from outside (the idea is k-diffusion's)."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary

# Activations between two parts of a network. Every tensor is batch-first, so that rows are taken by
# tuple(x[index] for x in state).
State: TypeAlias = tuple[torch.Tensor, ...]


# What a model may have beside the attributes of ``Model``, and what stands for what it lacks.
_OPTIONAL: dict[str, Any] = {
    "network": None,  # its ``torch.nn.Module``: for ``channels_last`` and the default batch size
    "timesteps": None,  # a ``TimestepWeights`` that the strategies' probes follow
    "loss_weights": None,  # ``LossWeights``: what a classifier's losses count at each timestep
    "shortlist": None,  # a ``Shortlist``, used while the classes are those it was learned for
    # (layer, what it gives [M, T, D], condition [M, D]) to the image's tokens of it, [M, N, D]:
    # where a block holds the prompt's among them
    "image_tokens": None,
    "detection": None,  # a ``DetectionRule``: when an object counts as found
    "segmentation": None,  # a ``SegmentationRule``: how error maps count at a place
    "layout_format": None,  # a ``LayoutFormat``, of a layout-to-image model
    "default_cache": "exact",  # of a ``StagedModel``: the level that measurement found best
}


def optional(model: Any, name: str) -> Any:
    """What a model says of one of the attributes that it need not have.

    Raises:
        KeyError: there is no such optional attribute.
    """
    return getattr(model, name, _OPTIONAL[name])


@runtime_checkable
class Model(Protocol):
    """A frozen conditional diffusion model; ``optional`` lists what it may have beside this.

    ``engine.model_checks`` holds a model to it: its attributes when a predictor is made, what its
    methods return at the first batch.

    Attributes:
        name: what the user called it.
        schedule: the noise schedule it was trained with.
        vocabulary: the embeddings of its possible answers.
        latent_shape: (C, h, w) of x0.
        image_shape: (channels, size, size) of the images that ``encode`` takes.
        device: where it computes.
        dtype: what it computes in.
        inverse_temperature: beta of log p(y | x0) = -beta L + log p(y).
    """

    name: str
    schedule: Schedule
    vocabulary: Vocabulary
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    inverse_temperature: float

    def identity(self) -> dict[str, Any]:
        """What tells this model from another, for JSON; a run is only resumed on the same."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, channels, size, size] in [-1, 1] to x0, float32 [B, C, h, w]."""
        ...

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The network: x_t [M, C, h, w], t int64 [M], condition [M, D] to [M, C or 2C, h, w].

        A tensor of float32, bfloat16 or float16 on ``device``, differentiable in ``condition``.
        Dropout is off.
        """
        ...


@runtime_checkable
class StagedModel(Model, Protocol):
    """A model that offers its network in parts, so that activations can be kept and reused.

        predict(x_t, t, c) == decoder(encoder(prefix(x_t, t), p), p),   p = project(c)

    to floating-point tolerance. What later parts need of x_t or t (the timestep embedding) travels
    inside the states.

    A model may state ``default_cache``, the cache level that measurement found best for it ("exact"
    where it says nothing).
    """

    def prefix(self, x_t: torch.Tensor, t: torch.Tensor) -> State:
        """All that the condition does not enter: x_t [M, C, h, w], t int64 [M] to M rows.

        Exact, and never needs a gradient: neither the image nor the weights are optimised.
        """
        ...

    def project(self, condition: torch.Tensor) -> State:
        """All that depends on the condition alone: [N, D] to N rows (keys and values, say).

        Differentiable.
        """
        ...

    def encoder(self, prefix: State, projected: State) -> State:
        """The first part that the condition enters, row by row; M rows of each to M rows.

        Its output holds all that ``decoder`` needs besides ``projected``. Differentiable in
        ``projected``.
        """
        ...

    def decoder(self, encoded: State, projected: State) -> torch.Tensor:
        """The rest of the network: M rows of each to the prediction [M, C or 2C, h, w].

        Differentiable in both.
        """
        ...
