"""What a learned head says of an image, for one evaluation."""

from __future__ import annotations

from collections.abc import Generator

import torch

from dive_fast.core.requests import Features
from dive_fast.strategies.base import Task


def look(task: Task) -> Generator[Features, torch.Tensor, torch.Tensor]:
    """Reads the task's head at the mean of the vocabulary; for ``yield from`` in a search.

    The probe is the one of the list whose timestep is nearest to the head's.

    Returns:
        float32 [C], higher is better; not finite where the features are not.
    """
    head = task.head
    nearest = (task.probes.timesteps - head.timestep).abs().argmin()
    v0 = task.vocabulary.mean()[None]
    reply = yield Features(v0, nearest[None], head.layer, head.pool)
    return head.read(reply[0])[0]
