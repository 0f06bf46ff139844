"""Small GeoDiffusion checkpoints of the real classes: Stable Diffusion with location tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from tiny_sd import make_text_encoder, make_unet, make_vae, write_tokenizer
from transformers import CLIPTokenizer

GRID = 5
LENGTH = 40  # tokens of a prompt; "An image with" takes 11 in the tiny tokenizer
PUBLISHED = {
    "dataset": "coco_stuff",
    "prompt_template": "An image with {bbox}",
    "num_bucket_per_side": [GRID, GRID],
    "max_num_bbox": 18,
    "width": 32,
    "height": 32,
}


def write_geodiffusion(
    directory: Path,
    *,
    config: dict | None = None,
    n_tokens: int = GRID**2,
    published: bool = True,
    length: int = LENGTH,
    seed: int = 0,
) -> Path:
    """A pipeline directory, made as GeoDiffusion's training does.

    Args:
        config: ``generation_config.json``; none is written if None.
        n_tokens: location tokens.
        published: with the tokenizer's files as transformers wrote them then, ``added_tokens.json``
            beside the vocabulary, not as it writes them today.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        folder = _write_tokenizer(directory / "tokenizer", length)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        start = len(tokenizer)
        tokenizer.add_tokens([f"<l{i}>" for i in range(n_tokens)])
        encoder = make_text_encoder(tokenizer, length=length)
        pipeline = StableDiffusionPipeline(
            make_vae(),
            encoder,
            tokenizer,
            make_unet(12),
            PNDMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(directory)
    if published:
        (folder / "tokenizer.json").unlink()
        _write_tokenizer(folder, length)
        added = {f"<l{i}>": start + i for i in range(n_tokens)}
        (folder / "added_tokens.json").write_text(json.dumps(added))
    if config is not None:
        (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


def _write_tokenizer(folder: Path, length: int) -> Path:
    path = write_tokenizer(folder) / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "model_max_length": length}))
    return folder
