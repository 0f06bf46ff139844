"""Pictures of noise that evaluations are tried on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tiny import NAMES


def pixels(n: int) -> np.ndarray:
    """uint8 [n, 8, 8]."""
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8), dtype=np.uint8)


def write_pictures(folder: Path) -> Path:
    """Three images of each class of the small DiT, in a sub-folder per class."""
    for i, array in enumerate(pixels(12)):
        path = folder / NAMES[i % 4] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return folder
