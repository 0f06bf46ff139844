"""Makes the zoo's ``scenes``: a layout-to-image model of digits with boxes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.data import scenes
from dive_fast.data.scenes import SceneMaker, Scenes, load_scenes
from dive_fast.logs import LogTo, check_log_to
from dive_fast.training.layout import Batch, train_into
from dive_fast.training.layout_losses import LayoutTrainingConfig
from dive_fast.training.loop import prepare_directory

N_HELD_OUT = 256  # scenes whose loss the log states
SCENES = LayoutTrainingConfig(in_channels=1)
SCENES_FORMAT = LayoutFormat.compact(scenes.NAMES, scenes.MAX_OBJECTS, scenes.GRID)


def train_scenes(
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    bf16: bool = False,
    log_to: LogTo | None = None,
    progress: bool = True,
) -> dict:
    """Trains the zoo's ``scenes`` into ``out``, a diffusers model directory.

    Args:
        steps: fewer than the zoo's, for a try.
        bf16: the network computes in bfloat16; its weights stay float32.
        log_to: where the losses go while it learns, as for ``evaluation.evaluate``.

    Returns:
        What is expected of it: the loss of held-out scenes with their layout, and with that of an
        empty canvas.

    Raises:
        DataError: scikit-learn, whose digits the scenes show, is not installed.
        RunError: ``out`` holds a finished model or another training run, or cannot be written.
    """
    check_log_to(log_to)
    out = Path(out)
    config = dataclasses.replace(SCENES, steps=steps or SCENES.steps, seed=seed, bf16=bf16)
    make, held_out = SceneMaker("train"), load_scenes("test", N_HELD_OUT)
    prepare_directory(out)

    def draw(step: int) -> Batch:
        return scene_batch(make(config.batch_size, (config.seed, step)))

    command, data = "dive-fast train scenes", {"source": "scenes"}
    shown = scene_batch(held_out)
    return train_into(out, SCENES_FORMAT, config, draw, shown, command, progress, data, log_to)


def scene_batch(made: Scenes) -> Batch:
    """Images uint8 [N, 1, 32, 32] and tokens int64 [N, S]."""
    return torch.from_numpy(made.images)[:, None], scene_tokens(made.boxes, made.class_ids)


def scene_tokens(boxes: np.ndarray, class_ids: np.ndarray) -> Tensor:
    """The layouts of scenes as tokens of ``SCENES_FORMAT``, int64 [N, S].

    What ``LayoutFormat.encode`` gives for each, all at once: training needs it at every step.
    """
    sides = torch.from_numpy(boxes) // scenes.STEP
    return SCENES_FORMAT.write(torch.from_numpy(class_ids), sides)
