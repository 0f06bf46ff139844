"""Pictures of noise for tests: the same ones in every process, whatever ran there before.

Pillow's ``effect_noise`` draws from the C library's ``rand``, whose state is the process's.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise_picture(size: tuple[int, int], sigma: float) -> Image.Image:
    """Grey, (width, height): Gaussian noise about 128, cut off at black and white."""
    noise = np.random.default_rng(0).normal(128, sigma, size[::-1])
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))
