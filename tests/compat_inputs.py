"""Arguments of Diffusion Classifier's functions, for small UNets."""

from __future__ import annotations

from argparse import Namespace

import torch
from diffusers import EulerDiscreteScheduler
from tiny_unet import LAYOUTS

CHANNELS, SIZE, WIDTH = 4, 8, LAYOUTS["sd2"]["cross_attention_dim"]
N_PROMPTS = 5


def make_args(n_samples=(10, 50), to_keep=(3, 1), **changed) -> Namespace:
    defaults = {"n_trials": 1, "batch_size": 32, "dtype": "float32", "loss": "l2"}
    return Namespace(
        **{"n_samples": n_samples, "to_keep": to_keep, "version": "2-0", **defaults, **changed}
    )


def make_scheduler(**changed) -> EulerDiscreteScheduler:
    """Stable Diffusion's schedule, new for every run: the published loop changes it."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changed
    )


def make_text(n_prompts: int) -> torch.Tensor:
    """[P, L, D]."""
    return torch.randn(n_prompts, 3, WIDTH, generator=torch.Generator().manual_seed(1))


def draw_noise(n: int, shape=(CHANNELS, SIZE, SIZE), seed: int = 9) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


TEXT = make_text(N_PROMPTS)
LATENT = draw_noise(1, seed=3)
