"""GLIGEN and GeoDiffusion directories with random weights, in the published configuration.

What they answer means nothing; what they cost is what the published ones cost. The tokenizer is
CLIP's own, from the list of merges that comes with open_clip.
"""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionGLIGENPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FAMILIES = ("gligen", "geodiffusion")
PROMPT = 77  # tokens
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2
SIZES: dict[str, dict[str, Any]] = {
    "published": {
        "unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512),
        "text": 768, "heads": 12, "layers": 12, "cells": 256,
    },
    "reduced": {
        "unet": (32, 64, 64, 64), "vae": (32, 32, 32, 32),
        "text": 96, "heads": 4, "layers": 2, "cells": 32,
    },
}  # fmt: skip


def write(directory: Path, family: str, size: str, pixels: int) -> Path:
    """A pipeline directory in float16 files, for images of ``pixels`` squared."""
    torch.manual_seed(0)
    chosen = SIZES[size]
    tokenizer = CLIPTokenizer.from_pretrained(_write_tokenizer(directory / "tokenizer"))
    if family == "geodiffusion":
        tokenizer.add_tokens([f"<l{i}>" for i in range(chosen["cells"] ** 2)])
    kind = {
        "gligen": StableDiffusionGLIGENPipeline,
        "geodiffusion": StableDiffusionPipeline,
    }[family]
    pipeline = kind(
        _vae(chosen, pixels).half(),
        _text(chosen, tokenizer).half(),
        tokenizer,
        unet(family, size, pixels // 8).half(),
        DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    if family == "geodiffusion":
        stated = {
            "prompt_template": "An image with {bbox}",
            "num_bucket_per_side": [chosen["cells"]] * 2,
            "max_num_bbox": 18,
            "width": pixels,
            "height": pixels,
        }
        (directory / "generation_config.json").write_text(json.dumps(stated))
    return directory


def unet(family: str, size: str, side: int) -> UNet2DConditionModel:
    """The network for latents of ``side`` squared; the weights' shapes do not depend on it."""
    chosen = SIZES[size]
    network = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=chosen["unet"],
        cross_attention_dim=chosen["text"],
        attention_head_dim=8,
        **({"attention_type": "gated"} if family == "gligen" else {}),
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "alpha" in name:  # gates begin closed
                parameter.fill_(1.0)
    return network.eval().requires_grad_(False)


def _vae(chosen: dict[str, Any], pixels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=chosen["vae"],
        layers_per_block=2,
        latent_channels=4,
        sample_size=pixels,
    ).eval()


def _text(chosen: dict[str, Any], tokenizer: CLIPTokenizer) -> CLIPTextModel:
    width = chosen["text"]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=chosen["layers"],
        num_attention_heads=chosen["heads"],
        max_position_embeddings=PROMPT,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def _write_tokenizer(directory: Path) -> Path:
    """CLIP's ``vocab.json`` and ``merges.txt``."""
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        raise SystemExit("CLIP's merges come with open_clip: pip install open_clip_torch")
    path = Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    letters = _letters()
    words = [*letters, *(c + "</w>" for c in letters)]
    words += ["".join(merge.split()) for merge in merges]
    words += [START, END]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"model_max_length": PROMPT, "tokenizer_class": "CLIPTokenizer", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    return directory


def _letters() -> list[str]:
    """The 256 letters that stand for bytes in CLIP's vocabulary, in its order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(shown)
    return [*map(chr, shown), *(chr(256 + i) for i in range(hidden))]
