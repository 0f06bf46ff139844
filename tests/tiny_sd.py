"""Small Stable Diffusion checkpoints of the real classes, as their ``save_pretrained`` writes them.

Random weights, scaled so that the prompt moves the loss: answers mean nothing, but they differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

LENGTH = 16  # tokens of a prompt
SIZE = 16  # side of the images; latents are 8 x 8
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(directory: Path, pad: str = END) -> Path:
    """``vocab.json`` and ``merges.txt`` as published: all letters, and a few merges."""
    directory.mkdir(parents=True, exist_ok=True)
    characters = [*"!.,'", *map(chr, range(ord("a"), ord("z") + 1))]
    merges = [("p", "h"), ("ph", "o"), ("o", "f</w>"), ("c", "a"), ("ca", "t</w>"), ("d", "o")]
    words = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), START, END]
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    return directory


def make_text_encoder(
    tokenizer: CLIPTokenizer,
    *,
    projection: int | None = None,
    width: int = 12,
    length: int = LENGTH,
    layers: int = 3,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """With a projection as SDXL's second one."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=projection or 8,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


def make_vae(**changes: object) -> AutoencoderKL:
    """RGB 16 x 16 to latents of 4 channels, 8 x 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        **changes,
    ).eval()


def make_unet(width: int, *, added: int | None = None, **changes: object) -> UNet2DConditionModel:
    """Two levels of 8 and 16 channels; SDXL's layout where ``added`` values join the time."""
    options: dict = dict(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    if added is not None:
        options.update(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + added,
        )
    model = UNet2DConditionModel(**(options | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn2" in name and parameter.ndim == 2:
                parameter.mul_(4)
    return model


def write_sd(
    directory: Path, *, target: str = "epsilon", seed: int = 0, euler: bool = False
) -> Path:
    """An SD 1.x or 2.x: one text encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(directory / "tokenizer"))
        scheduler = (EulerDiscreteScheduler if euler else PNDMScheduler)(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type=target,
            steps_offset=1,
        )
        pipeline = StableDiffusionPipeline(
            make_vae(),
            make_text_encoder(tokenizer),
            tokenizer,
            make_unet(12),
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return save_pipeline(pipeline, directory)


def write_sdxl(directory: Path, *, seed: int = 0, zeros: bool = True) -> Path:
    """An SDXL: two text encoders of 12 and 16, the second with a projection to 10."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = [
            CLIPTokenizer.from_pretrained(write_tokenizer(directory / f"tokenizer{s}", pad))
            for s, pad in (("", END), ("_2", "!"))
        ]
        pipeline = StableDiffusionXLPipeline(
            make_vae(),
            make_text_encoder(tokenizers[0]),
            make_text_encoder(tokenizers[1], projection=10, width=16),
            *tokenizers,
            make_unet(28, added=10),
            DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
            force_zeros_for_empty_prompt=zeros,
            add_watermarker=False,
        )
    return save_pipeline(pipeline, directory)


def write_to_hub(cache: Path, hub_id: str, write: Callable[[Path], Path] = write_sd) -> Path:
    """The same where ``huggingface_hub`` keeps what it has fetched of ``hub_id``."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return write(repository / "snapshots" / commit)


def save_pipeline(pipeline, directory: Path) -> Path:
    pipeline.save_pretrained(directory)
    # The published layout of a tokenizer, over whatever this version of transformers saves.
    for folder in directory.glob("tokenizer*"):
        (folder / "tokenizer.json").unlink(missing_ok=True)
        write_tokenizer(folder, "!" if folder.name == "tokenizer_2" else END)
    return directory
