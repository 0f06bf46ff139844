"""Makes a prior over the layouts of a layout-to-image model, and writes its directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from dive_fast.data.coco import CocoDataset, held_out_split, read_box_arrays, read_coco
from dive_fast.data.scenes import SceneMaker, load_scenes
from dive_fast.errors import ModelError, RunError
from dive_fast.models import load_model
from dive_fast.models.protocol import optional
from dive_fast.priors import LayoutPrior, layout_tokens
from dive_fast.training.prior_loop import Draw, PriorTrainingConfig, train_prior
from dive_fast.training.scenes import SCENES_FORMAT, scene_tokens

SCENES = "scenes"
N_HELD_OUT_SCENES = 512


class TrainedPrior(NamedTuple):
    """What came out: the loss of the held-out layouts, and what was learned from."""

    held_out_loss: float
    n_train: int | None  # None where every step draws new layouts
    n_held_out: int


def train_layout_prior(
    annotations: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[str], object] = print,
) -> TrainedPrior:
    """Trains a prior into ``out``, usually ``MODEL/prior``.

    A tenth of the images, always the same, is held out.

    Args:
        annotations: a COCO annotation file, an ``.npz`` of ``read_box_arrays``, or "scenes": the
            layouts of the zoo's training scenes, new ones at every step.
        model: the layout-to-image model whose tokens and embeddings the prior is over.
        steps: fewer or more than the 10,000 of ``PriorTrainingConfig``.
        tell: takes one sentence on everything that was left out.

    Raises:
        DataError: the annotations cannot be used, or hold fewer than two layouts that fit.
        ModelError: the model cannot be loaded, or has no layouts.
        RunError: ``out`` holds a prior already, a model or another training run, or cannot be
            written.
    """
    out = Path(out)
    check_free(out)
    loaded = load_model(model, device="cpu")
    layout = optional(loaded, "layout")
    if layout is None:
        raise ModelError(f"expected a layout-to-image model, got {model}, which has no layouts.")
    table = loaded.vocabulary.table
    config = PriorTrainingConfig(seed=seed)
    config = dataclasses.replace(config, steps=steps or config.steps)
    if str(annotations) == SCENES:
        if layout != SCENES_FORMAT:
            raise ModelError(f"expected a model of the scenes' layouts, got {model}.")
        train, held_out = None, load_scenes("test", N_HELD_OUT_SCENES)
        held_out = scene_tokens(held_out.boxes, held_out.class_ids)
        draw = draw_scenes(config)
    else:
        dataset = read_annotations(annotations)
        tokens, left_out = layout_tokens(dataset, layout)
        for sentence in (*dataset.problems, *left_out):
            tell(sentence)
        learned, kept = held_out_split(len(tokens), dataset.source)
        train, held_out = tokens[learned], tokens[kept]
        draw = draw_from(train, config)
    make_directory(out)
    torch.manual_seed(config.seed)
    prior = LayoutPrior.for_table(
        layout,
        table,
        draw(0) if train is None else train,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
    )
    loss = train_prior(prior, table, draw, held_out, config, out, progress)
    trained = TrainedPrior(loss, None if train is None else len(train), len(held_out))
    try:
        # Half precision halves the file; what is loaded again computes in float32.
        prior.half().save_pretrained(out)
        facts = {
            "command": f"dive-fast train-prior --annotations {Path(annotations).name} "
            f"--model MODEL --out DIR --steps {config.steps} --seed {config.seed}",
            "annotations": Path(annotations).name,
            "config": dataclasses.asdict(config),
            "expected": trained._asdict(),
        }
        (out / "dive_fast.json").write_text(json.dumps(facts, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} cannot be written ({error}).") from error
    return trained


def read_annotations(path: str | Path) -> CocoDataset:
    """The boxes of a COCO annotation file or of an ``.npz``, without pictures.

    Raises:
        DataError: it cannot be used.
    """
    return read_box_arrays(path) if str(path).endswith(".npz") else read_coco(path)


def draw_from(tokens: Tensor, config: PriorTrainingConfig) -> Draw:
    """Random layouts of a list."""
    seeds = torch.Generator().manual_seed(config.seed)
    base = int(torch.randint(2**40, (), generator=seeds))

    def draw(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(base + step)
        return tokens[torch.randint(len(tokens), (config.batch_size,), generator=generator)]

    return draw


def draw_scenes(config: PriorTrainingConfig) -> Draw:
    """New training scenes at every step."""
    make = SceneMaker("train")
    return lambda step: scene_tokens(*make.layouts(config.batch_size, (config.seed, step)))


def check_free(out: Path) -> None:
    """That a prior can be written to ``out``; asked first, because reading may take long.

    Raises:
        RunError: it is a file, or holds a finished prior or a model.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} cannot be made a directory: it is a file.")
    if (out / "model_index.json").exists():
        raise RunError(f"{out} holds a model; choose its folder prior as --out.")
    if (out / "dive_fast.json").exists():  # written last
        raise RunError(f"{out} holds a prior already; choose another --out.")


def make_directory(out: Path) -> None:
    """Makes the directory.

    Raises:
        RunError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made a directory: {error.strerror}.") from error
