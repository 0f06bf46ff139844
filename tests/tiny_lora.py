"""LoRA files as diffusers' training scripts write them, with random differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from flow_families import make_vae
from pipelines import make_t5, make_t5_tokenizer, save
from tiny_sd import make_text_encoder, write_tokenizer
from transformers import CLIPTokenizer

from dive_fast.models import load_model

CLASSES = ["cat", "dog"]
RANK, ALPHA = 2, 6
NETWORK = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP = ["q_proj", "v_proj"]


def write_lora(pipeline: Any, folder: Path, *parts: str, metadata: bool = True) -> Path:
    """Adds adapters to these parts, fills them with noise and saves them.

    Args:
        parts: "unet" or "transformer", "text_encoder", "text_encoder_2".
        metadata: also say alpha; without it alpha is the rank.
    """
    from peft import LoraConfig  # tests are skipped without
    from peft.utils import get_peft_model_state_dict

    layers, generator = {}, torch.Generator().manual_seed(0)
    for part in parts:
        module = getattr(pipeline, part)
        targets = CLIP if part.startswith("text") else NETWORK
        module.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
        for name, value in module.named_parameters():
            if "lora_" in name:
                value.data = 0.1 * torch.randn(value.shape, generator=generator)
        state = get_peft_model_state_dict(module, adapter_name="default")
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state)
    said = {part: getattr(pipeline, part) for part in parts} if metadata else {}
    type(pipeline).save_lora_weights(folder, **layers, **_collate_lora_metadata(said))
    return folder / "pytorch_lora_weights.safetensors"


def write_flux(directory: Path) -> Path:
    """A FLUX.1 [schnell] for images of 16 x 16."""
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(directory / "clip"))
    t5_tokenizer = make_t5_tokenizer()

    def make() -> FluxPipeline:
        return FluxPipeline(
            transformer=FluxTransformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=12,
                axes_dims_rope=(4, 4, 8),
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=make_vae(),
            text_encoder=make_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=make_t5(t5_tokenizer),
            tokenizer_2=t5_tokenizer,
        )  # fmt: skip

    save(make, directory)
    (directory / "dive_fast.json").write_text(json.dumps({"size": 16}))
    return directory


def load(directory: Path, lora: object = None, scale: object = 1.0, **options: Any) -> Any:
    """The model of a directory, with or without a LoRA."""
    said = {} if lora is None else {"lora": lora, "lora_scale": scale}
    return load_model(directory, device="cpu", classes=CLASSES, **said, **options)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Of the network and the text encoders."""
    modules = [model.network, *model.text.modules()]
    return {f"{i}.{n}": v for i, m in enumerate(modules) for n, v in m.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Whether two models have the same weights."""
    one, other = weights(a), weights(b)
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def calm(directory: Path, kind: Any) -> Path:
    """Text encoders of small models exaggerate: here they would make rounding large."""
    pipeline = kind.from_pretrained(directory)
    for name in ("text_encoder", "text_encoder_2"):
        for value in getattr(pipeline, name, torch.nn.Module()).parameters():
            if value.ndim == 2:
                value.data.div_(8)
    pipeline.save_pretrained(directory)
    return directory
