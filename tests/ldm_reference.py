"""Latent diffusion's layout-to-image network, written plainly on its own state dict.

Sizes are those of the published configuration or smaller ones; nothing here comes from diffusers.
Source: the architecture that arXiv 2112.10752 and its published configurations describe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNET, ENCODER, FIRST = "model.diffusion_model", "cond_stage_model.transformer", "first_stage_model"
HEAD = 64  # of the layout encoder


@dataclass(frozen=True)
class Sizes:
    """The published model's, unless said."""

    channels: int = 128
    mult: tuple[int, ...] = (1, 2, 3, 4)
    attention: tuple[int, ...] = (8, 4, 2)  # at which factors of downsampling
    resnets: int = 2
    head_channels: int = 32
    depth: int = 3
    context: int = 512
    latent: int = 3
    layers: int = 16
    heads: int = 8
    slots: int = 92
    tokens: int = 8192
    vae_channels: int = 128
    vae_mult: tuple[int, ...] = (1, 2, 4)
    vae_resnets: int = 2
    codes: int = 8192


SMALL = Sizes(
    channels=32, mult=(1, 2), attention=(2,), resnets=1, context=24, layers=2, heads=2, slots=8,
    tokens=70, vae_channels=32, vae_mult=(1, 2), vae_resnets=1, codes=11,
)  # fmt: skip


class Shapes(dict):
    """Names to shapes of weights."""

    def linear(self, name: str, i: int, o: int, *kernel: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = (o, i, *kernel)
        if bias:
            self[f"{name}.bias"] = (o,)

    def norm(self, name: str, c: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (c,)


def unet_plan(z: Sizes) -> tuple[list, list]:
    """("conv" | "res" | "down", in, out, attention) of inputs; ("up" flag at the end) outputs."""
    inputs, skips, c, ds = [("conv", z.latent, z.channels, False)], [z.channels], z.channels, 1
    for level, m in enumerate(z.mult):
        for _ in range(z.resnets):
            inputs.append(("res", c, m * z.channels, ds in z.attention))
            c = m * z.channels
            skips.append(c)
        if level + 1 < len(z.mult):
            inputs.append(("down", c, c, False))
            skips.append(c)
            ds *= 2
    outputs = []
    for level, m in reversed(list(enumerate(z.mult))):
        for i in range(z.resnets + 1):
            up = level > 0 and i == z.resnets
            outputs.append((c + skips.pop(), m * z.channels, ds in z.attention, up))
            c = m * z.channels
        ds //= 2
    return inputs, outputs


def unet_shapes(z: Sizes) -> Shapes:
    s, emb = Shapes(), 4 * z.channels

    def res(name: str, i: int, o: int) -> None:
        s.norm(f"{name}.in_layers.0", i)
        s.linear(f"{name}.in_layers.2", i, o, 3, 3)
        s.linear(f"{name}.emb_layers.1", emb, o)
        s.norm(f"{name}.out_layers.0", o)
        s.linear(f"{name}.out_layers.3", o, o, 3, 3)
        if i != o:
            s.linear(f"{name}.skip_connection", i, o, 1, 1)

    def transformer(name: str, c: int) -> None:
        s.norm(f"{name}.norm", c)
        s.linear(f"{name}.proj_in", c, c, 1, 1)
        for d in range(z.depth):
            block = f"{name}.transformer_blocks.{d}"
            for attn, context in (("attn1", c), ("attn2", z.context)):
                s.linear(f"{block}.{attn}.to_q", c, c, bias=False)
                s.linear(f"{block}.{attn}.to_k", context, c, bias=False)
                s.linear(f"{block}.{attn}.to_v", context, c, bias=False)
                s.linear(f"{block}.{attn}.to_out.0", c, c)
            s.linear(f"{block}.ff.net.0.proj", c, 8 * c)
            s.linear(f"{block}.ff.net.2", 4 * c, c)
            for i in (1, 2, 3):
                s.norm(f"{block}.norm{i}", c)
        s.linear(f"{name}.proj_out", c, c, 1, 1)

    inputs, outputs = unet_plan(z)
    s.linear("time_embed.0", z.channels, emb)
    s.linear("time_embed.2", emb, emb)
    for n, (kind, i, o, attention) in enumerate(inputs):
        if kind == "res":
            res(f"input_blocks.{n}.0", i, o)
            if attention:
                transformer(f"input_blocks.{n}.1", o)
        else:
            s.linear(f"input_blocks.{n}.0" + (".op" if kind == "down" else ""), i, o, 3, 3)
    c = z.channels * z.mult[-1]
    res("middle_block.0", c, c)
    transformer("middle_block.1", c)
    res("middle_block.2", c, c)
    for n, (i, o, attention, up) in enumerate(outputs):
        res(f"output_blocks.{n}.0", i, o)
        if attention:
            transformer(f"output_blocks.{n}.1", o)
        if up:
            s.linear(f"output_blocks.{n}.{1 + attention}.conv", o, o, 3, 3)
    s.norm("out.0", z.channels)
    s.linear("out.2", z.channels, z.latent, 3, 3)
    return s


def encoder_shapes(z: Sizes) -> Shapes:
    s, w, inner = Shapes(), z.context, z.heads * HEAD
    s["token_emb.weight"], s["pos_emb.emb.weight"] = (z.tokens, w), (z.slots, w)
    for i in range(z.layers):
        attention, forward = (f"attn_layers.layers.{2 * i + k}" for k in (0, 1))
        s.norm(f"{attention}.0", w)
        for name in "qkv":
            s.linear(f"{attention}.1.to_{name}", w, inner, bias=False)
        s.linear(f"{attention}.1.to_out", inner, w)
        s.norm(f"{forward}.0", w)
        s.linear(f"{forward}.1.net.0.0", w, 4 * w)
        s.linear(f"{forward}.1.net.2", 4 * w, w)
    s.norm("norm", w)
    s.linear("to_logits", w, z.tokens)
    return s


def vae_shapes(z: Sizes) -> Shapes:
    s, levels = Shapes(), [m * z.vae_channels for m in z.vae_mult]

    def res(name: str, i: int, o: int) -> None:
        for k, c in ((1, i), (2, o)):
            s.norm(f"{name}.norm{k}", c)
            s.linear(f"{name}.conv{k}", c, o, 3, 3)
        if i != o:
            s.linear(f"{name}.nin_shortcut", i, o, 1, 1)

    def middle(name: str, c: int) -> None:
        res(f"{name}.mid.block_1", c, c)
        s.norm(f"{name}.mid.attn_1.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            s.linear(f"{name}.mid.attn_1.{part}", c, c, 1, 1)
        res(f"{name}.mid.block_2", c, c)

    c = levels[0]
    s.linear("encoder.conv_in", 3, c, 3, 3)
    for i, o in enumerate(levels):
        for j in range(z.vae_resnets):
            res(f"encoder.down.{i}.block.{j}", c, o)
            c = o
        if i + 1 < len(levels):
            s.linear(f"encoder.down.{i}.downsample.conv", c, c, 3, 3)
    middle("encoder", c)
    s.norm("encoder.norm_out", c)
    s.linear("encoder.conv_out", c, z.latent, 3, 3)
    s.linear("quant_conv", z.latent, z.latent, 1, 1)
    s["quantize.embedding.weight"] = (z.codes, z.latent)
    s.linear("post_quant_conv", z.latent, z.latent, 1, 1)
    s.linear("decoder.conv_in", z.latent, c, 3, 3)
    middle("decoder", c)
    for i, o in reversed(list(enumerate(levels))):
        for j in range(z.vae_resnets + 1):
            res(f"decoder.up.{i}.block.{j}", c, o)
            c = o
        if i > 0:
            s.linear(f"decoder.up.{i}.upsample.conv", c, c, 3, 3)
    s.norm("decoder.norm_out", c)
    s.linear("decoder.conv_out", c, 3, 3, 3)
    return s


def make_state(z: Sizes, *, seed: int = 0, meta: bool = False, ema: bool = False) -> dict:
    """A checkpoint's state dict with random weights; with ``ema`` also averages of the UNet's."""
    generator, state = torch.Generator().manual_seed(seed), {}

    def weight(name: str, shape: tuple) -> Tensor:
        if meta:
            return torch.empty(shape, device="meta")
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 0.1 * value + float("norm" in name and name.endswith("weight"))
        return value if "emb" in name else value / math.sqrt(math.prod(shape[1:]))

    for prefix, shapes in ((UNET, unet_shapes), (ENCODER, encoder_shapes), (FIRST, vae_shapes)):
        for name, shape in shapes(z).items():
            state[f"{prefix}.{name}"] = weight(name, shape)
    if ema:
        for name, shape in unet_shapes(z).items():
            key = f"{UNET}.{name}".removeprefix("model.").replace(".", "")
            state[f"model_ema.{key}"] = weight(name, shape)
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(7)
    root = torch.linspace(0.0015**0.5, 0.0205**0.5, 1000, dtype=torch.float64)
    state["betas"] = root.square().float()
    return state


class Weights:
    """Functional layers on a part of a state dict."""

    def __init__(self, state: dict, prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def get(self, name: str) -> Tensor | None:
        return self.state.get(f"{self.prefix}.{name}")

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"), **options)

    def group_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.group_norm(x, 32, self.get(f"{name}.weight"), self.get(f"{name}.bias"), eps)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        shape = x.shape[-1:]
        return F.layer_norm(x, shape, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def attention(self, name: str, x: Tensor, context: Tensor, heads: int, out: str) -> Tensor:
        q = self.linear(f"{name}.to_q", x).unflatten(2, (heads, -1))
        k, v = (self.linear(f"{name}.to_{n}", context).unflatten(2, (heads, -1)) for n in "kv")
        dots = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("bhij,bjhd->bihd", dots.softmax(dim=-1), v)
        return self.linear(f"{name}.{out}", mixed.flatten(2))


def encode_layout(state: dict, z: Sizes, tokens: Tensor) -> Tensor:
    """The x-transformers encoder: tokens [B, S] to [B, S, D]."""
    w = Weights(state, ENCODER)
    x = w.get("token_emb.weight")[tokens] + w.get("pos_emb.emb.weight")
    for i in range(z.layers):
        a, f = (f"attn_layers.layers.{2 * i + k}" for k in (0, 1))
        h = w.layer_norm(f"{a}.0", x)
        x = x + w.attention(f"{a}.1", h, h, z.heads, "to_out")
        h = F.gelu(w.linear(f"{f}.1.net.0.0", w.layer_norm(f"{f}.0", x)))
        x = x + w.linear(f"{f}.1.net.2", h)
    return w.layer_norm("norm", x)


def predict(state: dict, z: Sizes, x: Tensor, t: Tensor, context: Tensor, ema=False) -> Tensor:
    """The openai UNet: x_t [B, C, h, w], t [B], context [B, S, D] to the prediction."""
    if ema:
        keys = [k for k in state if k.startswith(UNET)]
        flat = {k: f"model_ema.{k.removeprefix('model.').replace('.', '')}" for k in keys}
        state = {k: state[flat[k]] for k in keys}
    w = Weights(state, UNET)
    half = z.channels // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    emb = w.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    emb = F.silu(w.linear("time_embed.2", F.silu(emb)))

    def res(name: str, x: Tensor) -> Tensor:
        h = w.conv(f"{name}.in_layers.2", F.silu(w.group_norm(f"{name}.in_layers.0", x, 1e-5)),
                   padding=1)  # fmt: skip
        h = h + w.linear(f"{name}.emb_layers.1", emb)[:, :, None, None]
        h = w.conv(f"{name}.out_layers.3", F.silu(w.group_norm(f"{name}.out_layers.0", h, 1e-5)),
                   padding=1)  # fmt: skip
        if w.get(f"{name}.skip_connection.weight") is not None:
            x = w.conv(f"{name}.skip_connection", x)
        return x + h

    def transformer(name: str, x: Tensor) -> Tensor:
        heads, size = x.shape[1] // z.head_channels, x.shape[2:]
        h = w.conv(f"{name}.proj_in", w.group_norm(f"{name}.norm", x, 1e-6))
        h = h.flatten(2).transpose(1, 2)
        for d in range(z.depth):
            block = f"{name}.transformer_blocks.{d}"
            n = w.layer_norm(f"{block}.norm1", h)
            h = h + w.attention(f"{block}.attn1", n, n, heads, "to_out.0")
            n = w.layer_norm(f"{block}.norm2", h)
            h = h + w.attention(f"{block}.attn2", n, context, heads, "to_out.0")
            n = w.linear(f"{block}.ff.net.0.proj", w.layer_norm(f"{block}.norm3", h))
            value, gate = n.chunk(2, dim=2)
            h = h + w.linear(f"{block}.ff.net.2", value * F.gelu(gate))
        h = h.transpose(1, 2).unflatten(2, size)
        return x + w.conv(f"{name}.proj_out", h)

    inputs, outputs = unet_plan(z)
    skips = []
    for n, (kind, _, _, attention) in enumerate(inputs):
        name = f"input_blocks.{n}"
        if kind == "conv":
            x = w.conv(f"{name}.0", x, padding=1)
        elif kind == "down":
            x = w.conv(f"{name}.0.op", x, padding=1, stride=2)
        else:
            x = res(f"{name}.0", x)
            x = transformer(f"{name}.1", x) if attention else x
        skips.append(x)
    x = res("middle_block.2", transformer("middle_block.1", res("middle_block.0", x)))
    for n, (_, _, attention, up) in enumerate(outputs):
        name = f"output_blocks.{n}"
        x = res(f"{name}.0", torch.cat([x, skips.pop()], dim=1))
        x = transformer(f"{name}.1", x) if attention else x
        if up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = w.conv(f"{name}.{1 + attention}.conv", x, padding=1)
    return w.conv("out.2", F.silu(w.group_norm("out.0", x, 1e-5)), padding=1)


def encode_picture(state: dict, z: Sizes, x: Tensor) -> Tensor:
    """The VQ autoencoder's latents before quantisation."""
    w = Weights(state, FIRST)

    def res(name: str, x: Tensor) -> Tensor:
        h = x
        for k in (1, 2):
            h = F.silu(w.group_norm(f"{name}.norm{k}", h, 1e-6))
            h = w.conv(f"{name}.conv{k}", h, padding=1)
        if w.get(f"{name}.nin_shortcut.weight") is not None:
            x = w.conv(f"{name}.nin_shortcut", x)
        return x + h

    x = w.conv("encoder.conv_in", x, padding=1)
    for i in range(len(z.vae_mult)):
        for j in range(z.vae_resnets):
            x = res(f"encoder.down.{i}.block.{j}", x)
        if i + 1 < len(z.vae_mult):
            # Padded on the right and at the bottom only.
            x = w.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = res("encoder.mid.block_1", x)
    h = w.group_norm("encoder.mid.attn_1.norm", x, 1e-6)
    q, k, v = (w.conv(f"encoder.mid.attn_1.{n}", h).flatten(2) for n in "qkv")
    weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])).softmax(dim=2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    x = res("encoder.mid.block_2", x + w.conv("encoder.mid.attn_1.proj_out", mixed))
    x = w.conv("encoder.conv_out", F.silu(w.group_norm("encoder.norm_out", x, 1e-6)), padding=1)
    return w.conv("quant_conv", x)
