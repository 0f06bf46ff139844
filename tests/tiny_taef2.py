"""TAEF2's published form with random weights, and what those weights say that it computes.

The names and shapes are those of the published files, written down here; the computation is plain
functions of the tensors, which ask nothing of the package.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

WIDTH, LATENTS = 64, 32
# Layers by their number: a block, a pooled one, or a convolution of (outer, inner, bias).
BLOCK, POOLED = "block", "pooled"
HALVE = (WIDTH, WIDTH, False)
ENCODER = {
    0: (WIDTH, 3, True), 1: BLOCK,
    2: HALVE, 3: BLOCK, 4: BLOCK, 5: BLOCK,
    6: HALVE, 7: BLOCK, 8: BLOCK, 9: BLOCK,
    10: HALVE, 11: POOLED, 12: POOLED, 13: POOLED, 14: (LATENTS, WIDTH, True),
}  # fmt: skip
DECODER = {
    1: (WIDTH, LATENTS, True), 3: POOLED, 4: POOLED, 5: POOLED,
    7: HALVE, 8: BLOCK, 9: BLOCK, 10: BLOCK,
    12: HALVE, 13: BLOCK, 14: BLOCK, 15: BLOCK,
    17: HALVE, 18: BLOCK, 19: (3, WIDTH, True),
}  # fmt: skip


def random_weights(layers: dict, seed: int) -> dict[str, Tensor]:
    """float16, named as in the published ``.pth`` files; sizes stay about the same on the way."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 100
        return torch.randn(shape, generator=generator).div(fan_in**0.5).half()

    found = {}
    for i, layer in layers.items():
        if isinstance(layer, tuple):
            outer, inner, bias = layer
            found[f"{i}.weight"] = drawn(outer, inner, 3, 3)
            found |= {f"{i}.bias": drawn(outer)} if bias else {}
            continue
        for j in (0, 2, 4):
            found[f"{i}.conv.{j}.weight"] = drawn(WIDTH, WIDTH, 3, 3)
            found[f"{i}.conv.{j}.bias"] = drawn(WIDTH)
        if layer == POOLED:
            found[f"{i}.pool.0.weight"] = drawn(4 * WIDTH, WIDTH, 1, 1)
            found[f"{i}.pool.1.weight"] = 1 + drawn(4 * WIDTH)
            found[f"{i}.pool.1.bias"] = drawn(4 * WIDTH)
            found[f"{i}.pool.3.weight"] = drawn(WIDTH, 4 * WIDTH, 1, 1)
    return found


def write_pair(folder: Path, kind: str = "pth") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``taef2_encoder`` and ``taef2_decoder``; what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = random_weights(ENCODER, 0), random_weights(DECODER, 1)
    for part, weights in zip(("encoder", "decoder"), parts, strict=True):
        path = folder / f"taef2_{part}.{kind}"
        torch.save(weights, path) if kind == "pth" else save_file(weights, path)
    return parts


def write_single(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``taef2.safetensors``, in which the decoder's layers have numbers of one less."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder, decoder = random_weights(ENCODER, 0), random_weights(DECODER, 1)
    named = {f"encoder.layers.{key}": value for key, value in encoder.items()}
    for key, value in decoder.items():
        number, rest = key.split(".", 1)
        named[f"decoder.layers.{int(number) - 1}.{rest}"] = value
    save_file(named, folder / "taef2.safetensors")
    return encoder, decoder


def encode(weights: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """Latents of pictures in [0, 1]; any widths and numbers of blocks."""
    x = pictures
    for i in numbers(weights):
        if f"{i}.conv.0.weight" in weights:
            x = block(weights, i, x)
        else:
            # What has no bias halves.
            bias = value(weights, f"{i}.bias")
            x = F.conv2d(x, value(weights, f"{i}.weight"), bias, 1 if bias is not None else 2, 1)
    return x


def decode(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Pictures, about in [0, 1], of latents."""
    x = torch.tanh(latents / 3) * 3
    for i in numbers(weights):
        if f"{i}.conv.0.weight" in weights:
            x = block(weights, i, x)
            continue
        bias = value(weights, f"{i}.bias")
        if bias is None:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = F.conv2d(x, value(weights, f"{i}.weight"), bias, padding=1)
        if i == numbers(weights)[0]:
            x = x.relu()
    return x


def block(weights: dict[str, Tensor], i: int, x: Tensor) -> Tensor:
    if f"{i}.pool.0.weight" in weights:
        h = torch.einsum("oi,bihw->bohw", value(weights, f"{i}.pool.0.weight")[..., 0, 0], x)
        # Each quarter of the channels, at all places, to mean 0 and variance 1.
        quarters = h.unflatten(1, (4, -1))
        mean = quarters.mean(dim=(2, 3, 4), keepdim=True)
        variance = (quarters - mean).square().mean(dim=(2, 3, 4), keepdim=True)
        h = ((quarters - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        scale, shift = value(weights, f"{i}.pool.1.weight"), value(weights, f"{i}.pool.1.bias")
        h = (h * scale[:, None, None] + shift[:, None, None]).relu()
        x = x + torch.einsum("oi,bihw->bohw", value(weights, f"{i}.pool.3.weight")[..., 0, 0], h)
    h = x
    for j in (0, 2, 4):
        h = h if j == 0 else h.relu()
        weight, bias = (value(weights, f"{i}.conv.{j}.{name}") for name in ("weight", "bias"))
        h = F.conv2d(h, weight, bias, padding=1)
    return (x + h).relu()


def numbers(weights: dict[str, Tensor]) -> list[int]:
    return sorted({int(key.split(".")[0]) for key in weights})


def value(weights: dict[str, Tensor], key: str) -> Tensor | None:
    return weights[key].double() if key in weights else None
