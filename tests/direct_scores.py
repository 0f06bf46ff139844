"""Losses of prompts by a pipeline's own parts, without the product: for tests of its scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image


def colour_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """RGB, (width, height): noise of 8 bits."""
    draws = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(draws.astype(np.uint8))


class Direct:
    """An SD or SDXL directory as diffusers runs it."""

    def __init__(self, directory: Path) -> None:
        self.xl = (directory / "text_encoder_2").is_dir()
        kind = StableDiffusionXLPipeline if self.xl else StableDiffusionPipeline
        extra = {"add_watermarker": False} if self.xl else {}
        self.pipe = kind.from_pretrained(directory, **extra)

    @torch.no_grad()
    def x0(self, picture: Image.Image) -> torch.Tensor:
        """Of 16 x 16 pixels, [1, 4, 8, 8]."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        vae = self.pipe.vae
        return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor

    def condition(self, text: str) -> tuple[torch.Tensor, dict]:
        if not self.xl:
            return self.pipe.encode_prompt(text, "cpu", 1, False)[0], {}
        states, _, pooled, _ = self.pipe.encode_prompt(
            text, device="cpu", do_classifier_free_guidance=False
        )
        ids = self.pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), states.dtype, 10)
        return states, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    def maps(self, picture: Image.Image, text: str, probes) -> torch.Tensor:
        """(eps - eps_theta)^2 before its mean over the pixels, [K, 8, 8]."""
        with torch.no_grad():
            states, added = self.condition(text)
            return self.maps_of(self.x0(picture), states, added, probes)

    def maps_of(self, x0, states, added, probes) -> torch.Tensor:
        maps = []
        for t, row in zip(probes.timesteps, probes.noise_index, strict=True):
            alpha_bar, eps = self.pipe.scheduler.alphas_cumprod[t], probes.noise[row][None]
            x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
            found = self.pipe.unet(x_t, t, encoder_hidden_states=states, **added).sample
            maps.append((eps - found).square().mean(dim=1)[0])
        return torch.stack(maps)
