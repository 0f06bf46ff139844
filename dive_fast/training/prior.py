"""Makes a prior over the layouts of a layout-to-image model, and writes its directory.

    loss = -log p(k | v_t), the mean over all slots, at random t and noise

with k the slot's token. The prediction that makes it least is the one that makes the loss of the
noise least (``layout_prior``), and its gradient does not fade where the noise is nearly known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.data.coco import CocoDataset, held_out_split, read_box_arrays, read_coco
from dive_fast.data.scenes import SceneMaker, load_scenes
from dive_fast.errors import DataError, ModelError, RunError, shown
from dive_fast.logs import LogTo, check_log_to
from dive_fast.models import load_model, resolve
from dive_fast.models.files.sidecar import FILE, read_extra, write_extra
from dive_fast.models.protocol import optional
from dive_fast.predict.detector import LayoutDetector
from dive_fast.priors import LayoutPrior
from dive_fast.priors.tokens import fitting_layouts
from dive_fast.training.layout_fitting import EVALUATIONS, ExpectedDetector, fitted_or_told
from dive_fast.training.layout_tokens import shuffle_objects
from dive_fast.training.loop import make_directory, train
from dive_fast.training.scenes import SCENES_FORMAT, scene_tokens
from dive_fast.training.state import Course

SCENES = "scenes"
N_HELD_OUT_SCENES = 512
LEGIBLE = 0.25  # share of the schedule; noise below it leaves a token legible
HELD_OUT_ROWS = 2048  # (layout, noise) rows that the held-out loss is the mean of, at least
ROWS_AT_ONCE = 256
FITTED = 16  # images that the prior's weight is fitted to

# From the number of a step to its layouts as tokens, int64 [B, S]; the same number always gives
# the same ones, which makes resuming exact.
Draw = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class PriorTrainingConfig(Course):
    """What a prior is made of and how long it learns."""

    width: int = 192
    layers: int = 2
    heads: int = 4
    steps: int = 10_000


class TrainedPrior(NamedTuple):
    """What came out: the loss of the held-out layouts, and what was learned from."""

    held_out_loss: float
    n_train: int | None  # None where every step draws new layouts
    n_held_out: int


class _Known(NamedTuple):
    """The layouts of an annotation file as tokens, int64 [N, S], in two parts, and their images."""

    learned: Tensor
    held_out: Tensor
    images: CocoDataset  # of the second part


def train_layout_prior(
    annotations: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    bf16: bool = False,
    log_to: LogTo | None = None,
    progress: bool = True,
    tell: Callable[[str], object] = print,
) -> TrainedPrior:
    """Trains a prior into ``out``, usually ``MODEL/prior``.

    Held out are the images that the model did not learn from, where its directory names them, else
    a tenth of all, always the same.

    Args:
        annotations: a COCO annotation file, an ``.npz`` of ``read_box_arrays``, or "scenes": the
            layouts of the zoo's training scenes, new ones at every step.
        model: the layout-to-image model whose tokens and embeddings the prior is over.
        steps: fewer or more than the 10,000 of ``PriorTrainingConfig``.
        bf16: the network computes in bfloat16; its weights stay float32.
        log_to: where the losses go while it learns, as for ``evaluation.evaluate``.
        tell: takes one sentence on everything that was left out.

    Raises:
        DataError: the annotations cannot be used, or hold fewer than two layouts that fit.
        ModelError: the model cannot be loaded, or has no layouts.
        RunError: ``out`` holds a prior already, a model or another training run, or cannot be
            written.
    """
    check_log_to(log_to)
    out = Path(out)
    check_free(out)
    loaded = load_model(model, device="cpu")
    layout = optional(loaded, "layout_format")
    if layout is None:
        raise ModelError(f"expected a layout-to-image model, got {model}, which has no layouts.")
    table = loaded.vocabulary.table
    config = PriorTrainingConfig(seed=seed, bf16=bf16)
    config = dataclasses.replace(config, steps=steps or config.steps)
    if str(annotations) == SCENES:
        if layout != SCENES_FORMAT:
            raise ModelError(f"expected a model of the scenes' layouts, got {model}.")
        known, scenes = None, load_scenes("test", N_HELD_OUT_SCENES)
        held_out = scene_tokens(scenes.boxes, scenes.class_ids)
        draw = draw_scenes(config)
    else:
        dataset = read_annotations(annotations)
        dataset.tell_problems(tell)
        dataset.expect_objects("to learn from")
        parts = _parts(dataset, layout, read_extra(Path(model)), tell)
        known, held_out = parts.learned, parts.held_out
        draw = draw_from(known, config)
    make_directory(out)
    torch.manual_seed(config.seed)
    prior = LayoutPrior.for_table(
        layout,
        table,
        draw(0) if known is None else known,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
    )
    loss = train_prior(prior, table, draw, held_out, config, out, progress, log_to)
    trained = TrainedPrior(loss, None if known is None else len(known), len(held_out))
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
        write_extra(out, facts)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} cannot be written ({error}).") from error
    return trained


def _parts(
    dataset: CocoDataset, layout: LayoutFormat, facts: dict, tell: Callable[[str], object]
) -> _Known:
    """The layouts to learn from, and those of the images that the model did not see."""
    found = fitting_layouts(dataset, layout)
    for sentence in found.left_out:
        tell(sentence)
    images = [dataset.images[i] for i in found.images.tolist()]
    unseen = set(facts.get("held_out", ()))
    kept = torch.tensor([image.id in unseen for image in images])
    if not kept.any() or kept.all():
        rows, apart = held_out_split(len(images), dataset.source)
    else:
        rows, apart = (~kept).nonzero()[:, 0], kept.nonzero()[:, 0]
    left = dataclasses.replace(dataset, images=tuple(images[i] for i in apart.tolist()))
    return _Known(found.tokens[rows], found.tokens[apart], left)


def check_fit(annotations: str | Path, images: str | Path, model: str | Path) -> None:
    """What ``fit_prior`` needs; for those who train for long before it.

    Raises:
        DataError: no COCO annotation file, or none of its images is there.
        ModelError: the model is no directory to write to.
    """
    if not str(annotations).endswith(".json"):
        raise DataError(
            f"images belong to a COCO annotation file, got them with {shown(str(annotations))}."
        )
    if resolve(model).own_directory is None:
        raise ModelError(f"{model} is no directory of yours to write the prior's weight to.")
    read_coco(annotations, images)  # says what is missing


def fit_prior(
    annotations: str | Path,
    images: str | Path,
    model: str | Path,
    prior: str | Path,
    *,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[str], object] = print,
) -> ExpectedDetector | None:
    """Fits the weight of a prior, margin and beta to the images that were held out.

    They are written into the model's ``dive_fast.json``.

    Args:
        annotations, images: what prior and model learned from.
        model, prior: their directories.
        tell: takes a sentence on everything that was left out, and on a fit that failed.

    Returns:
        What to expect now; None where nothing could be fitted.

    Raises:
        DataError, ModelError: as ``train_layout_prior``.
    """
    check_fit(annotations, images, model)
    detector = LayoutDetector.from_pretrained(model, prior, device="cpu")
    dataset = read_coco(annotations, images)
    facts = read_extra(detector.directory)
    parts = _parts(dataset, detector.model.layout_format, facts, lambda _: None)
    there = tuple(image for image in parts.images.images if image.path is not None)
    left = dataclasses.replace(parts.images, images=there)
    found = fitted_or_told(detector, left, FITTED * EVALUATIONS * 2, seed, progress, tell)
    if found is not None:
        path = detector.save_fitted()
        write_extra(path.parent, read_extra(path.parent) | {"detector": dataclasses.asdict(found)})
    return found


def read_annotations(path: str | Path) -> CocoDataset:
    """The boxes of a COCO annotation file or of an ``.npz``, without images.

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
    if (out / FILE).exists():  # written last
        raise RunError(f"{out} holds a prior already; choose another --out.")


def train_prior(
    prior: LayoutPrior,
    table: Tensor,
    draw: Draw,
    held_out: Tensor,
    config: PriorTrainingConfig,
    out: Path,
    progress: bool = True,
    log_to: LogTo | None = None,
) -> float:
    """Trains in place; at the end the prior holds its averaged (EMA) weights.

    What is on disk meanwhile, and how a run that was cut off goes on, says ``loop.train``. Logged
    are the loss of the training (``loss``, of the tokens) and that of denoising the held-out
    layouts (``held_out``).

    Args:
        prior: untrained.
        table: the frozen embeddings of the tokens, float32 [V, D].
        draw: the layouts of every step; their objects are shuffled here.
        held_out: tokens int64 [n, S] that are never trained on.

    Returns:
        The final loss of denoising the held-out layouts.

    Raises:
        RunError: ``out`` holds the state of a run with another configuration, or a damaged one,
            or cannot be written.
    """

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        tokens = shuffle_objects(draw(step), generator)
        with config.autocast(table.device):
            return token_loss(prior, table, tokens, generator)

    finished = train(
        prior.train().requires_grad_(True),
        loss_of,
        config,
        out,
        # Priors of another model, or of other layouts, differ in their configuration.
        identity={"prior": dict(prior.config)},
        held_out=lambda: {"held_out": held_out_loss(prior, table, held_out, config)},
        log_to=log_to,
        progress=progress,
    )
    prior.requires_grad_(False)
    return finished.held_out["held_out"]


def token_loss(
    prior: LayoutPrior, table: Tensor, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """The mean of -log p(k | v_t) over layouts and slots."""
    v = table[tokens]
    t = slot_times(len(prior.schedule), tokens.shape, generator)
    v_t = prior.noised(v, t, torch.randn(v.shape, generator=generator))
    pairs = zip(prior.log_posteriors(v_t, t), prior.positions(tokens), strict=True)
    picked = [logs.gather(2, at[..., None]).flatten() for logs, at in pairs]
    return -torch.cat(picked).mean()


def slot_times(n: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Timesteps int64 [B, S], below n.

    Half of the layouts have one for all slots, as in diffusion. In the other half a random share
    of the slots has any, and the rest so little noise that it can be read.
    """
    rows, _ = shape
    same = torch.randint(n, (rows, 1), generator=generator)
    anything = torch.randint(n, shape, generator=generator)
    legible = (LEGIBLE * anything).long()
    hidden = torch.rand(shape, generator=generator) < torch.rand(rows, 1, generator=generator)
    mixed = torch.where(hidden, anything, legible)
    return torch.where(torch.rand(rows, 1, generator=generator) < 0.5, same, mixed)


def held_out_loss(
    prior: LayoutPrior, table: Tensor, held_out: Tensor, config: PriorTrainingConfig
) -> float:
    """|| eps - eps_phi(v_t, t) ||^2 / dim on layouts that are not trained on, the mean.

    Each meets several random t and noises, always the same.
    """
    generator = torch.Generator().manual_seed(config.seed)
    v, total = table[held_out], 0.0
    repeats = -(-HELD_OUT_ROWS // len(v))
    together = max(1, ROWS_AT_ONCE // len(v))
    for first in range(0, repeats, together):
        draws = [
            (
                torch.randint(len(prior.schedule), (len(v),), generator=generator),
                torch.randn(v.shape, generator=generator),
            )
            for _ in range(min(together, repeats - first))
        ]
        t, eps = (torch.cat(each) for each in zip(*draws, strict=True))
        v_t = prior.noised(v.repeat(len(draws), 1, 1), t, eps)
        total += len(draws) * (eps - prior(v_t, t)).square().mean().item()
    return total / repeats
