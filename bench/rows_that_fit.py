"""How many rows with a gradient fit a GPU, by what a backward keeps of one row: ``docs/models.md``.

    python -m bench.rows_that_fit

What autograd keeps is counted on the CPU in bfloat16, with random weights, at the published width
and size and with one and two layers; layers are alike, so the rest is multiplication. Weights do
not count as kept, and are added once: two bytes each. A tenth of the memory is left free. Rows
without a gradient (enumerate, race) need a fraction of it. Nothing here was measured on a GPU.
Networks whose self-attention has a mask (Lumina 2, Z-Image) are left out: on a CPU that keeps the
whole matrix of attention, on a GPU it need not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

GIGABYTES = (16, 24, 80)
FREE = 0.9


@dataclass(frozen=True)
class Published:
    """A published network: its class, its configuration, and one row of its inputs.

    Attributes:
        layers: how often each kind of layer occurs, by the name in the configuration.
        inputs: by the network's own names; shapes of one row, or tensors.
    """

    name: str
    network: str
    config: dict[str, Any]
    layers: dict[str, int]
    inputs: dict[str, Any] = field(default_factory=dict)


def _mask(n: int) -> Tensor:
    return torch.ones(1, n, dtype=torch.bfloat16)


PUBLISHED = (
    Published(
        "SD 3 medium", "SD3Transformer2DModel",
        {"attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16,
         "out_channels": 16, "joint_attention_dim": 4096, "patch_size": 2,
         "num_attention_heads": 24, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
         "sample_size": 128},
        {"num_layers": 24},
        {"hidden_states": (16, 128, 128), "encoder_hidden_states": (333, 4096),
         "pooled_projections": (2048,)},
    ),
    Published(
        "FLUX.1", "FluxTransformer2DModel",
        {"patch_size": 1, "in_channels": 64, "attention_head_dim": 128,
         "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
         "guidance_embeds": True},
        {"num_layers": 19, "num_single_layers": 38},
        {"hidden_states": (4096, 64), "encoder_hidden_states": (512, 4096),
         "pooled_projections": (768,), "img_ids": torch.zeros(4096, 3),
         "txt_ids": torch.zeros(512, 3), "guidance": torch.ones(1)},
    ),
    Published(
        "AuraFlow", "AuraFlowTransformer2DModel",
        {"sample_size": 64, "patch_size": 2, "in_channels": 4, "out_channels": 4,
         "attention_head_dim": 256, "num_attention_heads": 12, "joint_attention_dim": 2048,
         "caption_projection_dim": 3072, "pos_embed_max_size": 9216},
        {"num_mmdit_layers": 4, "num_single_dit_layers": 32},
        {"hidden_states": (4, 64, 64), "encoder_hidden_states": (256, 2048)},
    ),
    Published(
        "PixArt-Sigma, 1024 pixels", "PixArtTransformer2DModel",
        {"activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 72,
         "caption_channels": 4096, "cross_attention_dim": 1152, "in_channels": 4,
         "norm_elementwise_affine": False, "norm_eps": 1e-6, "norm_type": "ada_norm_single",
         "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "out_channels": 8,
         "patch_size": 2, "sample_size": 128, "use_additional_conditions": False},
        {"num_layers": 28},
        {"hidden_states": (4, 128, 128), "encoder_hidden_states": (300, 4096),
         "encoder_attention_mask": _mask(300),
         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    Published(
        "Sana 1.6 B", "SanaTransformer2DModel",
        {"attention_bias": False, "attention_head_dim": 32, "caption_channels": 2304,
         "cross_attention_dim": 2240, "cross_attention_head_dim": 112, "in_channels": 32,
         "mlp_ratio": 2.5, "norm_elementwise_affine": False, "norm_eps": 1e-6,
         "num_attention_heads": 70, "num_cross_attention_heads": 20, "out_channels": 32,
         "patch_size": 1, "sample_size": 32},
        {"num_layers": 20},
        {"hidden_states": (32, 32, 32), "encoder_hidden_states": (300, 2304),
         "encoder_attention_mask": _mask(300)},
    ),
)  # fmt: skip


def build(model: Published, device: str, layers: dict[str, int]) -> nn.Module:
    """With so many layers, frozen, in bfloat16."""
    with torch.device(device):
        network = getattr(diffusers, model.network)(**model.config, **layers)
    # ModelMixin.to() warns about modules to keep in float32 even where there are none.
    return nn.Module.to(network, torch.bfloat16).eval().requires_grad_(False)


def kept_bytes(network: nn.Module, model: Published) -> int:
    """What autograd keeps of one row beside the weights; the condition wants a gradient."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = {name: _row(value) for name, value in model.inputs.items()}
    inputs["encoder_hidden_states"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The result is held: what it holds must not be taken for something else's place.
        result = network(timestep=torch.full((1,), 0.5, dtype=torch.bfloat16), **inputs)
    assert torch.isfinite(result.sample).all()
    return sum(kept.values())


def _row(value: Any) -> Any:
    if isinstance(value, tuple):
        return torch.randn(1, *value, dtype=torch.bfloat16)
    return (
        value.to(torch.bfloat16)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
    )


def bytes_per_row(model: Published, measure: Callable[[nn.Module, Published], int]) -> int:
    """Of all layers, from one and from two of each kind."""
    one = dict.fromkeys(model.layers, 1)
    base = measure(build(model, "cpu", one), model)
    total = base
    for name, n in model.layers.items():
        two = measure(build(model, "cpu", {**one, name: 2}), model)
        total += (n - 1) * (two - base)
    return total


def main() -> None:
    print(
        f"| model | network, GB | a row with gradient, GB | {' | '.join(map(str, GIGABYTES))} GB |"
    )
    for model in PUBLISHED:
        network = build(model, "meta", model.layers)
        size = 2 * sum(p.numel() for p in network.parameters())
        row = bytes_per_row(model, kept_bytes)
        rows = [max(0, math.floor((FREE * gb * 1e9 - size) / row)) for gb in GIGABYTES]
        cells = [model.name, f"{size / 1e9:.1f}", f"{row / 1e9:.2f}", *map(str, rows)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
