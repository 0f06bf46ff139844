"""Which timestep embedding a DiT was trained with: measured, not guessed.

diffusers builds the frequencies of the timestep embedding with a shift of 1, the original DiT code
with 0. A checkpoint converted from the original code is evaluated slightly off by diffusers itself.
The right convention is the one with the lower noise-prediction loss on labelled images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dive_fast.errors import DiveFastError
from dive_fast.models.dit.model import FREQ_SHIFT, DiT
from dive_fast.predict.classifier import DiffusionClassifier


def timestep_embedding_losses(
    classifier: DiffusionClassifier,
    images: Any = None,
    labels: Sequence[int] | torch.Tensor = (),
    *,
    latents: torch.Tensor | None = None,
    probes: int = 50,
) -> dict[str, float]:
    """Mean loss of images under their true classes, for each convention; the lower one is right.

    Args:
        classifier: of the family "dit".
        images, latents: as ``DiffusionClassifier.__call__`` takes them; a few dozen are enough.
        labels: the true class of each, int [B].
        probes: (timestep, noise) pairs per image.

    Returns:
        ``{"diffusers": loss, "original": loss}``.

    Raises:
        DiveFastError: another family, or not one label per image.
    """
    model = classifier.model
    if not isinstance(model, DiT):
        raise DiveFastError(f"expected a model of the family dit, got {type(model).__name__}.")
    x0 = classifier.encode(images) if latents is None else latents
    if len(labels) != len(x0):
        raise DiveFastError(f"expected one label per image ({len(x0)}), got {len(labels)}.")
    before, found = model.timestep_embedding, {}
    try:
        for convention in FREQ_SHIFT:
            model.timestep_embedding = convention
            total = 0.0
            for c in sorted(set(map(int, labels))):
                chosen = torch.as_tensor([int(label) == c for label in labels])
                losses = classifier.losses(latents=x0[chosen], classes=[c], probes=probes)
                total += losses.mean(dim=2).double().sum().item()
            found[convention] = total / len(x0)
    finally:
        model.timestep_embedding = before
    return found
