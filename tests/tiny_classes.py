"""Pictures of three classes, and a training of seconds on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dive_fast.training.classes import ClassTrainingConfig, TrainedClasses, train_classes

NAMES = ("blue", "green", "red")
TINY = ClassTrainingConfig(
    image_size=8,
    patch_size=4,
    width=16,
    heads=2,
    layers=1,
    steps=4,
    batch_size=6,
    warmup_steps=1,
    samples_every=2,
    copies=2,
)


def write_colours(out: Path) -> Path:
    """Eight pictures of 11 x 9 of each colour, in a folder per class."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(reversed(NAMES)):
        (out / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 90, size=(9, 11, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(out / name / f"{i}.png")
    return out


def train(
    data: Path, out: Path, config: ClassTrainingConfig = TINY, **more: object
) -> TrainedClasses:
    return train_classes(data, out, config=config, progress=False, tell=lambda s: None, **more)


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
