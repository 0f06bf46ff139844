"""A small Stable Diffusion 3: three text encoders and a pooled embedding."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from pipelines import make_t5, make_t5_tokenizer, save
from tiny_sd import make_text_encoder, write_tokenizer
from transformers import CLIPTokenizer


def make_vae(channels: int = 4) -> AutoencoderKL:
    """RGB 16 x 16 to latents of 8 x 8, shifted and scaled."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def make_sd3(folder: Path, *, t5: bool = True) -> StableDiffusion3Pipeline:
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "clip"))
    t5_tokenizer = make_t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=18, pos_embed_max_size=12,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer, projection=8),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(tokenizer, projection=10, width=16),
        tokenizer_2=tokenizer,
        text_encoder_3=make_t5(t5_tokenizer, 32) if t5 else None,
        tokenizer_3=t5_tokenizer if t5 else None,
    )


def write_sd3(folder: Path) -> Path:
    """With T5, in a folder of this one."""
    return save(lambda: make_sd3(folder), folder / "model")
