"""Small class-conditional models that are not of the zoo, trained as a user of diffusers would.

    python -m bench.outside_models --model mnist_flow --data mnist_28px.npz --out OUT --minutes 12
    python -m bench.outside_models --model photo_ddpm --data COCO_FOLDER --out OUT --minutes 12
    python -m bench.outside_models --check OUT

The strategies' parameters were once chosen on the models of the zoo. These are other ones to choose
and check them on: other networks, sizes and schedules, plain loops of torch around diffusers' own
classes, nothing of ``dive_fast.training``. ``OUT`` gets

- a diffusers directory that ``DiffusionClassifier.from_pretrained`` reads, with the average of the
  weights over the training (EMA);
- ``data.npz``: ``x0_train``, ``y_train``, ``x0_test``, ``y_test``; x0 is float32 [N, C, h, w] as
  ``clf(latents=x0)`` takes it: pixels in [-1, 1], with EDM divided by sigma_data. Labels are int64
  [N]. ``train`` is of the part that training drew from, nothing of ``test`` is.

``--check`` prints the accuracy of enumeration and the CPU time of an evaluation, with one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from dive_fast import DiffusionClassifier
from dive_fast.data.coco import CocoDataset, read_coco
from dive_fast.data.mnist import load_mnist
from dive_fast.data.omniglot import load_omniglot

BATCH = 32
EMA_DECAY = 0.99
WARM_UP = 100  # steps
MAX_TRAIN, MAX_TEST = 6000, 600  # images in data.npz
SIGMA_DATA, LOG_SIGMA_MEAN, LOG_SIGMA_STD = 0.5, -1.2, 1.2  # EDM, arXiv 2206.00364, table 1
MIN_SIDE, CONTEXT, JITTER = 40, 1.1, 0.15  # crops of objects: pixels, and shares of the side
VERSIONS, MOST_PER_CLASS = 8, 120  # of a training object its crops; objects of one class
HELD_OUT_EVERY = 5  # photographs


@dataclass(frozen=True)
class Recipe:
    """One model: its data, size of the images in pixels, objective, and network."""

    data: str
    size: int
    objective: str  # "ddpm", "flow" or "edm"
    widths: tuple[int, ...] = ()  # of a UNet's levels; a DiT where there are none
    betas: str = "linear"
    label_dropout: float = 0.0  # of a UNet; a DiT of diffusers has its own, 0.1
    learning_rate: float = 3e-3
    n_classes: int | None = None  # the most frequent ones, or the first; all if None


RECIPES = {
    "mnist_ddpm": Recipe("mnist", 28, "ddpm", widths=(8, 16, 32), label_dropout=0.1),
    "mnist_flow": Recipe("mnist", 14, "flow", widths=(16, 32)),
    "mnist_edm": Recipe("mnist", 14, "edm", widths=(16, 32), label_dropout=0.1),
    "photo_ddpm": Recipe(
        "coco", 24, "ddpm", widths=(8, 24, 48), betas="squaredcos_cap_v2",
        label_dropout=0.1, n_classes=12,
    ),
    "photo_edm": Recipe("coco", 16, "edm", widths=(24, 48), n_classes=12),
    "omni_flow": Recipe("omniglot", 16, "flow", learning_rate=1e-3, n_classes=100),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """x0 float32 [N, C, h, w] in [-1, 1] and labels int64 [N], of both parts, and the names."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    names: tuple[str, ...]


def read_data(recipe: Recipe, path: Path) -> Data:
    """The file of MNIST or Omniglot, or the folder of COCO's annotations and ``images``."""
    if recipe.data == "coco":
        return read_objects(path, recipe.size, recipe.n_classes)
    load = load_mnist if recipe.data == "mnist" else load_omniglot
    arrays: list[torch.Tensor] = []
    for part in ("train", "test"):
        found = load(path, part)
        labels = torch.from_numpy(found.labels)
        kept = labels < (recipe.n_classes or len(found.names))
        x0 = torch.from_numpy(found.images).float()[kept, None] / 127.5 - 1
        # Mean of the pixels below each new pixel.
        arrays += [F.adaptive_avg_pool2d(x0, recipe.size), labels[kept]]
    return Data(*arrays, names=tuple(found.names[: recipe.n_classes]))


def read_objects(folder: Path, size: int, n_classes: int) -> Data:
    """Objects of photographs, cut out as squares; every fifth photograph is held out.

    A box counts from 40 pixels on its shorter side and is no crowd; the classes are the most
    frequent of these. Of a training object there are several crops, moved, scaled and mirrored.
    """
    dataset = read_coco(folder / "instances_train.json", folder / "images")
    counts = torch.zeros(len(dataset.names), dtype=torch.int64)
    for image in dataset.images:
        counts += torch.bincount(image.class_ids[usable(image)], minlength=len(counts))
    chosen = counts.argsort(descending=True, stable=True)[:n_classes]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(dataset.images), generator=generator).tolist()
    parts = {
        "test": cut_objects(dataset, order[::HELD_OUT_EVERY], chosen, size, None),
        "train": cut_objects(
            dataset, [i for n, i in enumerate(order) if n % HELD_OUT_EVERY], chosen, size, generator
        ),
    }
    names = tuple(dataset.names[int(c)] for c in chosen)
    return Data(*parts["train"], *parts["test"], names=names)


def usable(image: Any) -> torch.Tensor:
    """bool [n]: which objects of an image are large enough and not crowds."""
    sides = image.boxes[:, 2:] - image.boxes[:, :2]
    return (sides.amin(dim=1) >= MIN_SIDE) & ~image.crowd


def cut_objects(
    dataset: CocoDataset,
    positions: list[int],
    chosen: torch.Tensor,
    size: int,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops [N, 3, size, size] and labels [N]; with a generator several crops of an object."""
    crops, labels = [], []
    taken = [0] * len(chosen)
    for position in positions:
        image = dataset.images[position]
        picture = image.read().convert("RGB")
        for k in usable(image).nonzero()[:, 0].tolist():
            label = (chosen == image.class_ids[k]).nonzero()[:, 0].tolist()
            if not label or taken[label[0]] == MOST_PER_CLASS:
                continue
            taken[label[0]] += 1
            for version in range(1 if generator is None else VERSIONS):
                moves = torch.zeros(3)
                if generator is not None and version > 0:
                    moves = JITTER * (2 * torch.rand(3, generator=generator) - 1)
                crop = cut(picture, image.boxes[k], size, moves)
                crops.append(crop.flip(-1) if version % 2 else crop)
                labels.append(label[0])
    return torch.stack(crops), torch.tensor(labels)


def cut(picture: Any, box: torch.Tensor, size: int, moves: torch.Tensor) -> torch.Tensor:
    """The square around a box, [3, size, size]; moved and scaled by shares of its side."""
    side = float((box[2:] - box[:2]).max()) * CONTEXT * (1 + float(moves[2]))
    x, y = ((box[2:] + box[:2]) / 2 + moves[:2] * side).tolist()
    corners = [x - side / 2, y - side / 2, x + side / 2, y + side / 2]
    crop = picture.crop([round(v) for v in corners]).resize((size, size))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 127.5 - 1


def make_network(recipe: Recipe, channels: int, n_classes: int) -> torch.nn.Module:
    """A UNet that attends at its lowest level, or a DiT of patches of 2 x 2 pixels."""
    if not recipe.widths:
        return DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=24, in_channels=channels,
            out_channels=channels, num_layers=4, sample_size=recipe.size, patch_size=2,
            num_embeds_ada_norm=n_classes, norm_num_groups=1,
        )  # fmt: skip
    below = len(recipe.widths) - 1
    return UNet2DModel(
        sample_size=recipe.size, in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=recipe.widths, norm_num_groups=8, attention_head_dim=16,
        down_block_types=(*["DownBlock2D"] * below, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * below),
        num_class_embeds=n_classes + (recipe.label_dropout > 0),
    )  # fmt: skip


def make_scheduler(recipe: Recipe) -> Any:
    """The one that a user would sample with, and that states what was trained."""
    if recipe.objective == "flow":
        return FlowMatchEulerDiscreteScheduler()
    if recipe.objective == "edm":
        return EDMEulerScheduler(sigma_data=SIGMA_DATA)
    return DDPMScheduler(beta_schedule=recipe.betas)


def loss_of(
    network: torch.nn.Module, scheduler: Any, objective: str, x0: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """The objective's loss on a batch x0 [M, C, h, w] with labels [M], at random noise levels."""
    eps, m = torch.randn_like(x0), len(x0)
    if objective == "ddpm":
        # || eps - eps_theta(a_t x0 + s_t eps, t, y) ||^2
        t = torch.randint(0, scheduler.config.num_train_timesteps, (m,))
        predicted = network(scheduler.add_noise(x0, eps, t), t, class_labels=y).sample
        return F.mse_loss(predicted, eps)
    if objective == "flow":
        # || eps - x0 - v_theta((1 - sigma) x0 + sigma eps, 1000 sigma, y) ||^2
        sigma = torch.rand(m, 1, 1, 1)
        x_t = (1 - sigma) * x0 + sigma * eps
        predicted = network(x_t, timestep=1000 * sigma.flatten(), class_labels=y).sample
        return F.mse_loss(predicted, eps - x0)
    # lambda(sigma) || c_skip x + c_out F_theta(c_in x, log sigma / 4, y) - x0 ||^2
    sigma = (LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.randn(m, 1, 1, 1)).exp()
    x = x0 + sigma * eps
    total = sigma**2 + SIGMA_DATA**2
    raw = network(x / total.sqrt(), sigma.flatten().log() / 4, class_labels=y).sample
    denoised = SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * raw
    return ((denoised - x0).square() * total / (sigma * SIGMA_DATA) ** 2).mean()


def train(
    network: torch.nn.Module,
    scheduler: Any,
    recipe: Recipe,
    data: Data,
    minutes: float,
    max_steps: int | None = None,
) -> torch.nn.Module:
    """Adam for that long, the rate falling to zero with the time; returns the average of weights.

    Classes are drawn equally often, as those of photographs are not.
    """
    average = copy.deepcopy(network).eval()
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-4, fused=True)
    counts = torch.bincount(data.y_train).clamp(min=1)
    weights = (1 / counts.double())[data.y_train]
    network.train()
    step, begin, seen, told = 0, time.monotonic(), 0.0, 0.0
    while (share := (time.monotonic() - begin) / (60 * minutes)) < 1 and step != max_steps:
        rate = 0.5 * (1 + math.cos(math.pi * share)) * min(1, (step + 1) / WARM_UP)
        optimiser.param_groups[0]["lr"] = recipe.learning_rate * rate
        drawn = torch.multinomial(weights, BATCH, replacement=True)
        y = data.y_train[drawn]
        if recipe.label_dropout:
            y = torch.where(torch.rand(len(y)) < recipe.label_dropout, len(data.names), y)
        loss = loss_of(network, scheduler, recipe.objective, data.x_train[drawn], y)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        seen = loss.item() if step == 1 else 0.99 * seen + 0.01 * loss.item()
        if time.monotonic() - told > 20:
            told = time.monotonic()
            print(f"step {step}, {share:.0%} of the time, loss {seen:.4f}", flush=True)
    print(f"{step} steps of {BATCH}, loss {seen:.4f}", flush=True)
    return average


def save(
    network: torch.nn.Module, scheduler: Any, data: Data, out: Path, trained: dict[str, Any]
) -> None:
    """The diffusers directory, ``data.npz``, and in ``trained.json`` how it was made."""
    if isinstance(network, DiTTransformer2DModel):
        pipeline = DiTPipeline(network, None, scheduler)
    else:
        pipeline = DDPMPipeline(network, scheduler)
    pipeline.save_pretrained(out)
    index = out / "model_index.json"
    content = json.loads(index.read_text())
    if content.get("vae", ...) == [None, None]:
        del content["vae"]  # there are no latents
    index.write_text(json.dumps(content | {"id2label": dict(enumerate(data.names))}, indent=2))
    order = torch.Generator().manual_seed(0)
    unit = SIGMA_DATA if isinstance(scheduler, EDMEulerScheduler) else 1.0
    arrays = {}
    for part, x0, y, most in (
        ("train", data.x_train, data.y_train, MAX_TRAIN),
        ("test", data.x_test, data.y_test, MAX_TEST),
    ):
        kept = torch.randperm(len(x0), generator=order)[:most]
        arrays |= {f"x0_{part}": (x0[kept] / unit).numpy(), f"y_{part}": y[kept].numpy()}
    np.savez(out / "data.npz", **arrays)
    (out / "trained.json").write_text(json.dumps(trained, indent=2))


def check(out: Path, n: int, probes: int) -> None:
    """Prints enumeration's accuracy on held-out images, and the CPU time of an evaluation."""
    clf = DiffusionClassifier.from_pretrained(out, batch_size=64)
    with np.load(out / "data.npz") as arrays:
        x0, y = torch.from_numpy(arrays["x0_test"][:n]), arrays["y_test"][:n].tolist()
    begin = time.process_time()
    answers = clf(latents=x0, strategy="enumerate", probes=probes)
    seconds = time.process_time() - begin
    evaluations = sum(answer.evaluations for answer in answers)
    pairs = zip(answers, y, strict=True)
    right = sum(clf.names.index(answer.label) == label for answer, label in pairs)
    print(
        f"{out.name}: {len(clf.names)} classes, x0 {list(x0.shape[1:])}, {right} of {len(y)} right "
        f"({right / len(y):.1%}) with {probes} probes, "
        f"{1000 * seconds / evaluations:.2f} ms of CPU per evaluation"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(RECIPES))
    parser.add_argument("--data", type=Path, help="the .npz file, or COCO's folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, metavar="OUT", help="measure a trained model")
    parser.add_argument("--images", type=int, default=100, help="to check with")
    parser.add_argument("--probes", type=int, default=32, help="to check with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check is not None:
        check(options.check, options.images, options.probes)
        return
    if None in (options.model, options.data, options.out):
        parser.error("expected --model, --data and --out, or --check.")
    torch.manual_seed(options.seed)
    recipe = RECIPES[options.model]
    data = read_data(recipe, options.data)
    print(f"{len(data.x_train)} training images, {len(data.x_test)} held out, {data.names}")
    network = make_network(recipe, data.x_train.shape[1], len(data.names))
    scheduler = make_scheduler(recipe)
    average = train(network, scheduler, recipe, data, options.minutes)
    trained = {"model": options.model, "minutes": options.minutes, "seed": options.seed}
    save(average, scheduler, data, options.out, trained)


if __name__ == "__main__":
    main()
