"""Small Stable Diffusion checkpoints in one file, as the original code writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from ldm_reference import FIRST, UNET, Sizes, unet_shapes, vae_shapes
from pipelines import make_t5, make_t5_tokenizer
from safetensors.torch import save_file
from tiny_sd import (
    make_text_encoder,
    make_unet,
    make_vae,
    save_pipeline,
    write_sd,
    write_sdxl,
    write_tokenizer,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

SIZES = Sizes(
    channels=8, mult=(1, 2), attention=(1,), resnets=1, depth=1, context=12, latent=4,
    vae_channels=8, vae_mult=(1, 1), vae_resnets=2,
)  # fmt: skip
XL_SIZES = replace(SIZES, attention=(2,), depth=2)
SD2_SIZES = replace(SIZES, resnets=2, context=1024)  # by which this kind is known


def write_single_file(directory: Path, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The weights of a Stable Diffusion 1.x directory under their original names."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory)
    state = original_unet(pipeline.unet, list(unet_shapes(SIZES))) | original_vae(pipeline.vae)
    state |= original_clip(pipeline.text_encoder, "cond_stage_model.transformer")
    return save(state, file, dtype)


def write_xl(directory: Path) -> Path:
    """An SDXL with as many layers in its second encoder as tell one file from another."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(write_sdxl(directory))
    tokenizer = pipeline.tokenizer_2
    encoder = make_text_encoder(tokenizer, projection=16, width=16, layers=11)
    pipeline.register_modules(text_encoder_2=encoder, unet=make_unet(28, added=16))
    return save_pipeline(pipeline, directory)


def write_single_xl(directory: Path, file: Path) -> Path:
    """The weights of such a directory under their original names."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(directory)
    names = [f"label_emb.0.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    state = original_unet(pipeline.unet, [*unet_shapes(XL_SIZES), *names])
    state |= original_vae(pipeline.vae)
    state |= original_clip(pipeline.text_encoder, "conditioner.embedders.0.transformer")
    state |= original_open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model")
    return save(state, file)


def write_sd2(directory: Path) -> Path:
    """An SD 2.x, of v prediction as its configuration on the hub."""
    pipeline = StableDiffusionPipeline.from_pretrained(write_sd(directory, target="v_prediction"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        encoder = make_text_encoder(pipeline.tokenizer, width=1024, layers=1)
        unet = make_unet(1024, layers_per_block=2, use_linear_projection=True)
    pipeline.register_modules(text_encoder=encoder, unet=unet)
    return save_pipeline(pipeline, directory)


def write_single_sd2(directory: Path, file: Path) -> Path:
    """Its original has one layer more than is used, and a projection that is not."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory)
    state = original_unet(pipeline.unet, list(unet_shapes(SD2_SIZES)))
    state |= original_vae(pipeline.vae)
    prefix = "cond_stage_model.model"
    text = original_open_clip(pipeline.text_encoder, prefix)
    layer = f"{prefix}.transformer.resblocks"
    more = {key.replace(f"{layer}.0.", f"{layer}.1."): value for key, value in text.items()}
    return save(state | more | text, file)


def write_sd3(directory: Path, *, t5: bool) -> Path:
    """An SD 3.5 large, which is known by its number of layers and not by its widths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(directory / "tokenizer"))
        t5_tokenizer = make_t5_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=38,
            attention_head_dim=8, num_attention_heads=1, joint_attention_dim=32,
            caption_projection_dim=8, pooled_projection_dim=22, pos_embed_max_size=12,
            qk_norm="rms_norm", dual_attention_layers=(0,),
        )  # fmt: skip
        with torch.no_grad():  # norms, which are made of ones, differ too
            for value in transformer.parameters():
                value.add_(torch.randn_like(value) / 100)
        encoder = make_text_encoder(tokenizer, projection=12)
        encoder.text_projection.weight.data = torch.eye(12)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=make_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=make_text_encoder(tokenizer, projection=10, width=16),
            tokenizer_2=tokenizer,
            text_encoder_3=make_t5(t5_tokenizer, 32) if t5 else None,
            tokenizer_3=t5_tokenizer if t5 else None,
        )
    pipeline.save_pretrained(directory)
    return directory


def write_single_sd3(pipeline: StableDiffusion3Pipeline, file: Path) -> Path:
    """The weights of such a pipeline under their original names."""
    state = original_sd3(pipeline.transformer) | original_vae(pipeline.vae)
    encoders = {"clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2}
    if pipeline.text_encoder_3 is not None:
        encoders["t5xxl"] = pipeline.text_encoder_3
    for name, encoder in encoders.items():
        for key, value in encoder.state_dict().items():
            state[f"text_encoders.{name}.transformer.{key}"] = value
    del state["text_encoders.clip_l.transformer.text_projection.weight"]
    return save(state, file)


SD3_PARTS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_HEADS = {
    "x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def original_sd3(transformer: nn.Module) -> dict[str, Tensor]:
    """Query, key and value in one matrix; of the last norms shift before scale."""
    state = transformer.state_dict()
    found = {"pos_embed": state["pos_embed.pos_embed"]}
    last = transformer.config.num_layers - 1
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in SD3_PARTS:
            found[f"{SD3_PARTS[module]}.{kind}"] = value
        elif module.startswith("transformer_blocks."):
            _, i, part = module.split(".", 2)
            if part in SD3_BLOCK:
                found[f"joint_blocks.{i}.{SD3_BLOCK[part]}.{kind}"] = value
    for i in range(last + 1):
        for name, parts in SD3_HEADS.items():
            for kind in ("weight", "bias"):
                keys = [f"transformer_blocks.{i}.{part}.{kind}" for part in parts]
                if keys[0] in state:
                    heads = torch.cat([state[key] for key in keys])
                    found[f"joint_blocks.{i}.{name}.qkv.{kind}"] = heads
    for name in ("final_layer", f"joint_blocks.{last}.context_block"):
        for kind in ("weight", "bias"):
            scale, shift = found[f"{name}.adaLN_modulation.1.{kind}"].chunk(2)
            found[f"{name}.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    return {f"{UNET}.{key}": value for key, value in found.items()}


def save(state: dict[str, Tensor], file: Path, dtype: torch.dtype = torch.float32) -> Path:
    state = {key: value.detach().to(dtype).contiguous().clone() for key, value in state.items()}
    # What every such file has beside: a schedule, and averages that are not read.
    state["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    state["model_ema.decay"] = torch.tensor(0.9999)
    save_file(state, file)
    return file


def original_unet(unet: nn.Module, names: list[str]) -> dict[str, Tensor]:
    asked = {f"{UNET}.{name}": torch.tensor([i]) for i, name in enumerate(names)}
    found = convert_ldm_unet_checkpoint(asked, unet.config)
    state = unet.state_dict().items()
    return {f"{UNET}.{names[int(found[key])]}": value for key, value in state}


def original_vae(vae: nn.Module) -> dict[str, Tensor]:
    names = [name for name in vae_shapes(SIZES) if not name.startswith("quantize")]
    asked = {f"{FIRST}.{name}": torch.tensor([i]) for i, name in enumerate(names)}
    found = convert_ldm_vae_checkpoint(asked, vae.config)
    state = {names[int(found[key])]: value for key, value in vae.state_dict().items()}
    # Attention of 1 x 1 convolutions.
    attention = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    return {
        f"{FIRST}.{name}": value[:, :, None, None]
        if name.endswith(attention) and value.ndim == 2
        else value
        for name, value in state.items()
    }


def original_clip(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}.text_model.{key.removeprefix('text_model.')}": value
        for key, value in encoder.state_dict().items()
    }


def original_open_clip(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Query, key and value in one matrix, and the projection the other way round."""
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    width = encoder.config.hidden_size
    found = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        # Without one a model is made of the layers alone; the file has it all the same.
        "text_projection": state.get("text_projection.weight", torch.zeros(width, width)).T,
        "logit_scale": torch.tensor(4.6),
    }
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
        for i in range(encoder.config.num_hidden_layers):
            new, old = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            heads = [state[f"{new}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{old}.attn.in_proj_{kind}"] = torch.cat(heads)
            for name, original in parts.items():
                found[f"{old}.{original}.{kind}"] = state[f"{new}.{name}.{kind}"]
    return {f"{prefix}.{key}": value for key, value in found.items()}


def write_configurations(directory: Path, to: Path) -> Path:
    """What the hub has beside the weights, and nothing of these."""
    for path in directory.rglob("*"):
        if path.suffix in (".json", ".txt"):
            copy = to / path.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return to
