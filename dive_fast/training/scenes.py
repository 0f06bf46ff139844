"""Makes the zoo's layout-to-image models: trains one and writes a model directory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.schedule import Schedule
from dive_fast.core.timesteps import BINS, TimestepWeights
from dive_fast.data import scenes
from dive_fast.data.scenes import SceneMaker, load_scenes
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.transformer import (
    LayoutTransformerModel,
    build_layout_transformer,
    denoise,
)
from dive_fast.training.layout import (
    SCENES,
    Draw,
    LayoutTrainingConfig,
    train_layout_model,
)
from dive_fast.training.loop import prepare_directory

TOKEN_STD = 0.5
N_HELD_OUT = 256  # scenes whose loss the log states
SCENES_FORMAT = LayoutFormat.compact(scenes.NAMES, scenes.MAX_OBJECTS, scenes.GRID)


def train_scenes(
    out: str | Path, *, steps: int | None = None, seed: int = 0, progress: bool = True
) -> dict:
    """Trains the zoo's ``scenes`` into ``out``, a diffusers model directory.

    Args:
        steps: fewer than the zoo's, for a try.

    Returns:
        What is expected of it: the loss of held-out scenes with their layout, and with that of an
        empty canvas.

    Raises:
        DataError: scikit-learn, whose digits the scenes show, is not installed.
        RunError: ``out`` holds a finished model or another training run, or cannot be written.
    """
    out = Path(out)
    config = dataclasses.replace(SCENES, steps=steps or SCENES.steps, seed=seed)
    make, held_out = SceneMaker("train"), load_scenes("test", N_HELD_OUT)
    prepare_directory(out)

    def draw(step: int) -> tuple[np.ndarray, Tensor]:
        made = make(config.batch_size, (config.seed, step))
        return made.images, scene_tokens(made.boxes, made.class_ids)

    shown = (held_out.images, scene_tokens(held_out.boxes, held_out.class_ids))
    command, data = "dive-fast train scenes", {"source": "scenes"}
    return train_into(out, SCENES_FORMAT, config, draw, shown, command, progress, data)


def train_into(
    out: Path,
    layout: LayoutFormat,
    config: LayoutTrainingConfig,
    draw: Draw,
    held_out: tuple[np.ndarray, Tensor],
    command: str,
    progress: bool,
    data: Mapping[str, Any],
) -> dict[str, float]:
    """Trains a new model and writes its directory; returns what is expected of it.

    Args:
        data: what tells the pictures and layouts that are learned from others.

    Raises:
        RunError: the directory cannot be written, or holds another training's state.
    """
    torch.manual_seed(config.seed)
    trained = build(layout, config)
    whole = {"layout": layout.to_dict(), **data}
    expected = train_layout_model(
        trained, draw, held_out, layout.none, config, out, progress, whole
    )
    scheduler = DDPMScheduler(beta_schedule="linear")
    model = LayoutTransformerModel(trained.transformer, trained.encoder, scheduler)
    # Half precision halves the file; what is loaded again computes in float32.
    model.to(torch.device("cpu"), torch.float16).save_pretrained(out)
    facts = {"command": command, "config": dataclasses.asdict(config), "expected": expected}
    if config.max_weight is not None:
        facts["timesteps"] = learned_timesteps(config, model.schedule).to_dict()
    (out / "dive_fast.json").write_text(json.dumps(facts, indent=2) + "\n")
    return expected


def learned_timesteps(config: LayoutTrainingConfig, schedule: Schedule) -> TimestepWeights:
    """A detector's probes lie where the training looked, and count as they did there."""
    n, (low, high) = len(schedule), config.t_range
    of_t = (schedule.s / schedule.a).square().clamp(max=config.max_weight)
    weights = of_t.view(BINS, n // BINS).mean(dim=1)
    inside = [low <= (b + 0.5) / BINS < high for b in range(BINS)]
    density = tuple(float(seen) for seen in inside)
    return TimestepWeights(n, density, tuple(round(w, 6) for w in weights.tolist()))


class Trained(nn.Module):
    """A transformer and its layout encoder, as they are trained: x_t, t and tokens to the noise."""

    def __init__(self, transformer: nn.Module, encoder: LayoutEncoder) -> None:
        super().__init__()
        self.transformer, self.encoder = transformer, encoder

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.encoder.token_embedding(tokens))
        return denoise(self.transformer, x_t, t, hidden)


def build(layout: LayoutFormat, config: LayoutTrainingConfig) -> Trained:
    """The untrained model of a configuration."""
    transformer, encoder = build_layout_transformer(
        layout,
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        patch_size=config.patch_size,
        channels=config.channels,
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        encoder_layers=config.encoder_layers,
        encoder_heads=config.encoder_heads,
    )
    start_tokens(encoder, layout)
    return Trained(transformer, encoder)


def start_tokens(encoder: LayoutEncoder, layout: LayoutFormat) -> None:
    """Corners that are near each other start with embeddings that are near each other.

    The first half of the width holds sines and cosines of x, the second half those of y. All tokens
    are of one size, large enough that the first steps do not wipe out where they began.
    """
    width = encoder.config.width
    # From one period over the whole picture to one over two steps of the grid.
    n = width // 4
    frequencies = math.pi * (layout.grid / 2) ** (torch.arange(n) / max(1, n - 1))
    angles = torch.linspace(0, 1, layout.grid)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [G, width / 2]
    corners = torch.cat(
        [waves[None].expand(layout.grid, -1, -1), waves[:, None].expand(-1, layout.grid, -1)], dim=2
    )
    start, stop = layout.coordinate_range
    with torch.no_grad():
        table = encoder.token_embedding.weight.normal_(std=TOKEN_STD)
        table[start:stop, : 4 * n] = corners.flatten(0, 1) * (TOKEN_STD * math.sqrt(2))
        encoder.position_embedding.weight.normal_(std=TOKEN_STD)


def scene_tokens(boxes: np.ndarray, class_ids: np.ndarray) -> Tensor:
    """The layouts of scenes as tokens of ``SCENES_FORMAT``, int64 [N, S].

    What ``LayoutFormat.encode`` gives for each, all at once: training needs it at every step.
    """
    sides = torch.from_numpy(boxes) // scenes.STEP
    return SCENES_FORMAT.write(torch.from_numpy(class_ids), sides)
