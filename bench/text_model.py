"""Trains a small text-to-image model of coloured shapes, in Stable Diffusion's layout.

    python -m bench.text_model --out DIR --minutes 35
    python -m bench.text_model --out MORE --minutes 35 --begin DIR --seed 2

UNet and text encoder learn together, of pictures and captions that ``bench.shapes`` draws; the VAE
has weights by hand: it puts 2 x 2 pixels of three colours into 12 channels. Every 100 steps the
loss is printed and appended to DIR/log.jsonl, and every 5 minutes the model is saved. With
``--begin`` it learns on from a saved one, by other draws.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bench.shapes import COLOURS, RELATIONS, SHAPES, SIDE, draw_scene, training_caption

WORDS = ("a", "and", *COLOURS, *SHAPES, *dict.fromkeys(" ".join(RELATIONS).split()))
LENGTH = 16  # tokens of a prompt
START, END = "<|startoftext|>", "<|endoftext|>"
BATCH, LEARNING_RATE, WARM_UP = 32, 1.5e-3, 100
NO_CAPTION = 0.06
LARGE = 1000.0  # see _through_norm
SCALE = 2.8  # one over the deviation of the pixels, about


def write_tokenizer(directory: Path) -> None:
    """``vocab.json`` and ``merges.txt`` under which each of ``WORDS`` is one token."""
    directory.mkdir(parents=True, exist_ok=True)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:
            parts = _merged(parts, merge)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _merged(parts, merges[-1])
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    tokens = dict.fromkeys(tokens)
    (directory / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(special))


def _merged(parts: list[str], merge: tuple[str, str]) -> list[str]:
    """Every neighbouring pair of this kind made one, from the left."""
    found, at = [], 0
    while at < len(parts):
        both = tuple(parts[at : at + 2]) == merge
        found.append("".join(parts[at : at + 2]) if both else parts[at])
        at += 1 + both
    return found


def make_vae() -> AutoencoderKL:
    """RGB 24 x 24 to latents [12, 12, 12]: 2 x 2 pixels of three colours, in their order.

    The decoder gives back the mean of each 2 x 2 pixels.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=12,
        norm_num_groups=1,
        sample_size=SIDE,
        scaling_factor=SCALE,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "norm" not in name:
                parameter.zero_()  # each residual block adds nothing
        eye = torch.eye(32)
        encoder, decoder = vae.encoder, vae.decoder
        encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
        down = encoder.down_blocks[0].downsamplers[0].conv
        for colour in range(3):
            for y in range(2):
                for x in range(2):
                    channel = 4 * colour + 2 * y + x
                    down.weight[channel, colour, y, x] = 1
                    down.weight[12 + channel, colour, y, x] = -1
        _through_norm(down.bias, encoder.conv_out.weight, eye[:12, :12])
        encoder.conv_out.bias[12:] = -30.0  # log of the posterior's variance
        vae.quant_conv.weight[:, :, 0, 0] = torch.eye(24)
        vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(12)
        means = torch.eye(3).repeat_interleave(4, dim=1) / 4
        decoder.conv_in.weight[:12, :, 1, 1] = torch.eye(12)
        decoder.conv_in.weight[12:24, :, 1, 1] = -torch.eye(12)
        decoder.up_blocks[0].upsamplers[0].conv.weight[:, :, 1, 1] = eye
        _through_norm(decoder.conv_in.bias, decoder.conv_out.weight, means)
    return vae.eval()


def _through_norm(bias: torch.Tensor, out: torch.Tensor, matrix: torch.Tensor) -> None:
    """Makes GroupNorm, SiLU and the last convolution a linear map of the 12 channels before them.

    Channels 12 to 23 hold their negatives, and silu(x) - silu(-x) = x. Large constants, whose mean
    is 0, in the others keep the norm's deviation what it is: LARGE / 2.
    """
    bias[24:28], bias[28:] = LARGE, -LARGE
    rows = len(matrix)
    out[:rows, :12, 1, 1] = LARGE / 2 * matrix
    out[:rows, 12:24, 1, 1] = -LARGE / 2 * matrix


def make_pipeline(directory: Path, width: int) -> StableDiffusionPipeline:
    """Random UNet and text encoder of seed 0, and the VAE above."""
    torch.manual_seed(0)
    write_tokenizer(directory / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=12,
        out_channels=12,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        make_vae(),
        CLIPTextModel(text),
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipeline: StableDiffusionPipeline, directory: Path) -> None:
    """As published: the tokenizer's two files, whatever this version of transformers writes."""
    pipeline.save_pretrained(directory)
    (directory / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    write_tokenizer(directory / "tokenizer")


def batches(seed: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Pixels float32 [32, 3, 24, 24] in [-1, 1], and a caption each; "" for some."""
    rng = np.random.default_rng((seed, 11))
    while True:
        scenes = [draw_scene(rng, int(n)) for n in rng.choice([1, 2, 3], BATCH, p=[0.1, 0.5, 0.4])]
        captions = [
            "" if rng.random() < NO_CAPTION else training_caption(rng, truth) for _, truth in scenes
        ]
        pixels = torch.from_numpy(np.stack([picture for picture, _ in scenes]))
        yield pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, captions


def train(pipeline: StableDiffusionPipeline, directory: Path, minutes: float, seed: int) -> None:
    """Minimises || eps - eps_theta(x_t, t, text) ||^2 for so long; saves the averaged weights."""
    unet, text = pipeline.unet.train(), pipeline.text_encoder.train()
    learned = nn.ModuleList([unet, text])
    averaged = copy.deepcopy(learned).eval()
    optimiser = torch.optim.AdamW(learned.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    alphas = pipeline.scheduler.alphas_cumprod
    begun, losses, step, saved = time.monotonic(), [], 0, 0.0
    generator = torch.Generator().manual_seed(seed)
    for pixels, captions in batches(seed):
        spent = (time.monotonic() - begun) / 60
        if spent >= minutes:
            break
        rate = min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * spent / minutes))
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * max(rate, 0.01)
        x0 = F.pixel_unshuffle(pixels, 2) * SCALE  # what the VAE makes of them
        t = (torch.rand(BATCH, generator=generator) * len(alphas)).long()
        eps = torch.randn(x0.shape, generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        tokens = pipeline.tokenizer(
            captions, padding="max_length", max_length=LENGTH, return_tensors="pt"
        ).input_ids
        predicted = unet(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, text(tokens)[0]).sample
        loss = F.mse_loss(predicted, eps)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), learned.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0:
            row = {"step": step, "minutes": round(spent, 2), "loss": float(np.mean(losses))}
            print(json.dumps(row), flush=True)
            with open(directory / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            losses = []
        if spent - saved > 5:
            saved = spent
            _save_averaged(pipeline, averaged, directory)
    _save_averaged(pipeline, averaged, directory)


def _save_averaged(pipeline, averaged: nn.ModuleList, directory: Path) -> None:
    save(StableDiffusionPipeline(**{**pipeline.components, "unet": averaged[0],
         "text_encoder": averaged[1]}, requires_safety_checker=False), directory)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR", type=Path)
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--begin", metavar="DIR", type=Path, help="a model to learn on from")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = make_pipeline(options.out, options.width)
    if options.begin is not None:
        for name in ("unet", "text_encoder"):
            part = getattr(pipeline, name)
            part.load_state_dict(type(part).from_pretrained(options.begin / name).state_dict())
    pixels, _ = next(batches(seed=0))
    with torch.no_grad():
        found = pipeline.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(found, F.pixel_unshuffle(pixels, 2), rtol=0, atol=1e-3)
    train(pipeline, options.out, options.minutes, options.seed)


if __name__ == "__main__":
    main()
