"""Small model directories of diffusers' own classes, as its ``save_pretrained`` writes them.

Random weights, scaled so that the class moves the loss: answers mean nothing, but they differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from tiny_transformer import make_transformer

NAMES = ("circle", "square", "star", "cross")
SIZE = 8  # side of the images


def write_model(
    directory: Path, *, names: Sequence[str] = NAMES, vae: bool = False, seed: int = 0
) -> Path:
    """Writes a DiT of grey 8 x 8 images or, with a VAE, of 2 x 4 x 4 latents of colour ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = make_vae() if vae else None
        transformer = make_transformer(
            seed,
            learned_sigma=False,
            n_classes=len(names),
            channels=2 if vae else 1,
            size=4 if vae else 8,
        )
    pipeline = DiTPipeline(transformer, autoencoder, DDIMScheduler())
    pipeline.save_pretrained(directory)
    index = read_json(directory / "model_index.json")
    index["id2label"] = {str(i): name for i, name in enumerate(names)}
    write_json(directory / "model_index.json", index)
    return directory


def make_vae() -> AutoencoderKL:
    """RGB 8 x 8 to latents of 2 channels, 4 x 4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        latent_channels=2,
        norm_num_groups=4,
        sample_size=SIZE,
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
