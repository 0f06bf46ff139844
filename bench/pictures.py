"""Training images of the zoo's models, moved: what parameters are chosen on.

Moved a little further than in training where that is needed for the model to be as unsure of them
as of new images.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from dive_fast.data.digits import load_digits
from dive_fast.data.omniglot import load_omniglot
from dive_fast.training.dit import DIGITS, OMNIGLOT, augment_images

MODELS = ("digits", "omniglot")
FURTHER = {"rotate_degrees": 12.0, "scale": 0.14, "shear": 0.15, "shift_pixels": 1.0}


def moved_pictures(model: str, data: Path | None, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 float32 [N, 1, h, w] of at most ``limit`` random training images, and their labels."""
    generator = torch.Generator().manual_seed(1)
    if model == "digits":
        train, config = load_digits("train"), dataclasses.replace(DIGITS, augment=1.0)
    else:
        train, config = load_omniglot(data, "train"), dataclasses.replace(OMNIGLOT, **FURTHER)
    pick = torch.randperm(len(train.images), generator=generator)[:limit]
    x0 = torch.from_numpy(train.images[pick.numpy()]).float().div(127.5).sub(1).unsqueeze(1)
    x0 = augment_images(x0, config, generator)
    return F.avg_pool2d(x0, x0.shape[-1] // config.sample_size), torch.from_numpy(train.labels)[
        pick
    ]
