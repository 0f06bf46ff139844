"""Photographs in ten classes: how far a diffusion model of one's own is from a small CNN.

    python -m bench.photo_classes crops --data FILE.zip --out CROPS
    dive-fast train-classes --data CROPS/train --out MODEL
    python -m bench.photo_classes score --crops CROPS --model MODEL
    python -m bench.photo_classes cnn --crops CROPS --minutes 20
    python -m bench.photo_classes vae --data FILE.zip --vae DIR

The pictures are objects of COCO's validation photographs, cut out by their boxes: up to 60 of a
class to learn from and up to 30 to measure on, of other photographs. ``cnn --validate`` measures on
a fifth of the training photographs instead, for choosing settings. ``vae`` encodes and decodes
every 20th photograph, at its size.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from bench.records import RESULTS, append_line
from dive_fast import DiffusionClassifier
from dive_fast.data import open_dataset
from dive_fast.data.images import from_bytes, image_bytes
from dive_fast.evaluation.machine import environment, machine
from dive_fast.models.autoencoder import encode_latents, image_shape
from dive_fast.training.augmentation import Augmentation
from dive_fast.training.classes_latents import decoded, load_autoencoder

GROUPS = {
    "animal": ["horse", "elephant", "dog", "cow", "sheep", "zebra", "giraffe", "cat", "bear"],
    "bag": ["handbag", "suitcase", "backpack"],
    "bus or truck": ["bus", "truck", "train"],
    "car": ["car"],
    "chair": ["chair"],
    "crockery": ["cup", "bowl", "bottle", "wine glass"],
    "food": [
        "pizza", "cake", "sandwich", "banana", "apple", "orange", "broccoli", "carrot", "donut",
        "hot dog",
    ],
    "person": ["person"],
    "seat": ["couch", "bed", "bench"],
    "table": ["dining table"],
}  # fmt: skip
LONG, SHORT = 24, 16  # pixels that the sides of an object have at least
OF_ONE_PHOTOGRAPH = 5
TEST_SHARE = 0.3  # of the photographs
N_TRAIN, N_TEST = 60, 30
MARGIN = 1.1  # the square, by the longer side of the box
AUGMENTED = Augmentation(flip=True, crop=0.3, colour=0.3)


def write_crops(archive: str, out: Path, seed: int = 0) -> Counter:
    """OUT/train/CLASS/*.png and OUT/test/CLASS/*.png; how many of each part and class."""
    category = {name: group for group, names in GROUPS.items() for name in names}
    with zipfile.ZipFile(archive) as file:
        boxes: dict[str, list[tuple[str, list[float]]]] = {}
        for part in ("train", "test"):
            coco = json.loads(file.read(f"instances_{part}.json"))
            names = {c["id"]: c["name"] for c in coco["categories"]}
            files = {i["id"]: i["file_name"] for i in coco["images"]}
            for a in coco["annotations"]:
                group, (_, _, w, h) = category.get(names[a["category_id"]]), a["bbox"]
                if group and not a["iscrowd"] and max(w, h) >= LONG and min(w, h) >= SHORT:
                    boxes.setdefault(files[a["image_id"]], []).append((group, a["bbox"]))
        photographs = sorted(boxes)
        np.random.default_rng(seed).shuffle(photographs)
        first_train, count = round(TEST_SHARE * len(photographs)), Counter()
        for number, name in enumerate(photographs):
            part = "test" if number < first_train else "train"
            most, here = (N_TEST if part == "test" else N_TRAIN), Counter()
            photograph = None
            for i, (group, box) in enumerate(boxes[name]):
                if count[part, group] >= most or here[group] >= OF_ONE_PHOTOGRAPH:
                    continue
                if photograph is None:
                    photograph = Image.open(io.BytesIO(file.read(f"images/{name}"))).convert("RGB")
                folder = out / part / group
                folder.mkdir(parents=True, exist_ok=True)
                cut_out(photograph, box).save(folder / f"{Path(name).stem}-{i}.png")
                count[part, group] += 1
                here[group] += 1
    return count


def cut_out(photograph: Image.Image, box: list[float]) -> Image.Image:
    """The square around a box, moved into the photograph where it would stand out."""
    x, y, w, h = box
    side = min(round(MARGIN * max(w, h)), *photograph.size)
    left = round(min(max(0, x + w / 2 - side / 2), photograph.width - side))
    top = round(min(max(0, y + h / 2 - side / 2), photograph.height - side))
    return photograph.crop((left, top, left + side, top + side))


class SmallNetwork(nn.Module):
    """A residual CNN of four stages, as the yardstick: 0.6 million parameters at width 32."""

    def __init__(self, n_classes: int, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.shortcuts, self.bodies = nn.ModuleList(), nn.ModuleList()
        before = width
        for i, wide in enumerate(widths):
            stride = 1 if i == 0 else 2
            self.shortcuts.append(nn.Conv2d(before, wide, 1, stride=stride))
            self.bodies.append(
                nn.Sequential(
                    nn.Conv2d(before, wide, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(wide),
                    nn.ReLU(),
                    nn.Conv2d(wide, wide, 3, padding=1, bias=False),
                    nn.BatchNorm2d(wide),
                )
            )
            before = wide
        self.head = nn.Linear(before, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for shortcut, body in zip(self.shortcuts, self.bodies, strict=True):
            x = F.relu(shortcut(x) + body(x))
        return self.head(F.dropout(x.mean(dim=(2, 3)), 0.2, self.training))


def train_cnn(x: torch.Tensor, y: torch.Tensor, minutes: float, width: int, seed: int) -> nn.Module:
    """Trains for so many minutes of CPU time, one cosine; x uint8 [N, 3, s, s]."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = SmallNetwork(int(y.max()) + 1, width).train()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    began, share = time.process_time(), 0.0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, share * 20 + 0.01) * 0.5 * (1 + np.cos(np.pi * share))
        rows = torch.randint(len(x), (64,), generator=generator)
        batch = AUGMENTED(from_bytes(x[rows]), generator)
        loss = F.cross_entropy(network(batch), y[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        share = (time.process_time() - began) / (60 * minutes)
    return network.eval()


def accuracy(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of the mean over a picture and its mirror image."""
    with torch.no_grad():
        x = from_bytes(x)
        found = network(x).softmax(dim=1) + network(x.flip(3)).softmax(dim=1)
    return (found.argmax(dim=1) == y).double().mean().item()


def read_part(folder: Path, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """uint8 [N, 3, size, size], labels [N], and the photograph of each."""
    pictures = open_dataset(folder, list(GROUPS))
    x = torch.stack([image_bytes(example.load(), size, 3) for example in pictures.examples])
    photographs = [Path(name).stem.split("-")[0] for name in pictures.ids]
    return x, torch.from_numpy(pictures.labels), photographs


def score_model(model: str, crops: Path, probe: bool) -> dict[str, Any]:
    """The test crops by ``auto`` with what was fitted, and what the model's training took.

    With ``probe`` also by a linear probe of its features.
    """
    classifier = DiffusionClassifier.from_pretrained(model)
    pictures = open_dataset(crops / "test", classifier.names)
    answers = classifier([example.load() for example in pictures.examples], strategy="auto")
    pairs = zip(answers, pictures.labels.tolist(), strict=True)
    extra = json.loads((Path(model) / "dive_fast.json").read_text())
    return {
        **measured(sum(a.index == y for a, y in pairs), len(answers)),
        "evaluations": sum(a.evaluations for a in answers) / len(answers),
        "seconds": sum(a.seconds for a in answers) / len(answers),
        "cpu_minutes": extra["cpu_seconds"] / 60,
        "config": extra["config"],
        "x0": list(classifier.model.latent_shape),
        "losses": extra["losses"],
        "stated": extra["expected"],
        **({"probe": linear_probe(classifier, crops)} if probe else {}),
        # Not where it lies.
        "environment": {**environment(classifier), "model": "train-classes"},
    }


def linear_probe(classifier: DiffusionClassifier, crops: Path) -> dict[str, Any]:
    """Learned from the training crops as ``dive-fast probe`` does, on the test crops."""
    train, test = (open_dataset(crops / part, classifier.names) for part in ("train", "test"))
    x0, test_x0 = (
        classifier.encode([example.load() for example in part.examples]) for part in (train, test)
    )
    fitted = classifier.fit_head(latents=x0, labels=train.labels, seed=0)
    head = fitted.head
    found = classifier.head_scores(head, latents=test_x0, seed=1).argmax(dim=1)
    right = int((found == torch.from_numpy(test.labels)).sum())
    chosen = {"layer": head.layer, "timestep": head.timestep, "grid": head.grid}
    return {**measured(right, len(found)), **chosen, "penalty": fitted.penalty}


def score_cnn(crops: Path, size: int, minutes: float, width: int, validate: bool) -> dict[str, Any]:
    """A CNN that learned for so long, on the test crops, or on a fifth of the training ones."""
    x, y, photographs = read_part(crops / "train", size)
    if validate:
        away = torch.tensor([in_validation(name) for name in photographs])
        (train_x, train_y), (test_x, test_y) = (x[~away], y[~away]), (x[away], y[away])
    else:
        (train_x, train_y), (test_x, test_y, _) = (x, y), read_part(crops / "test", size)
    network = train_cnn(train_x, train_y, minutes, width, seed=0)
    return {
        **measured(round(accuracy(network, test_x, test_y) * len(test_y)), len(test_y)),
        "cpu_minutes": minutes,
        "size": size,
        "width": width,
        "validation": validate,
        "trained_on": accuracy(network, train_x, train_y),
    }


def round_trip(archive: str, source: str) -> dict[str, Any]:
    """What an autoencoder loses of every 20th photograph, and what it takes.

    PSNR = -10 log10 mean (x - decoded)^2, x in [0, 1].
    """
    vae = load_autoencoder(source)
    factor = image_shape((1, 1, 1), vae)[1]
    psnr, encoding, decoding = [], [], []
    with zipfile.ZipFile(archive) as file:
        for name in sorted(n for n in file.namelist() if n.startswith("images/"))[::20]:
            photograph = Image.open(io.BytesIO(file.read(name)))
            width, height = (side // factor * factor for side in photograph.size)
            pixels = np.array(photograph.convert("RGB").crop((0, 0, width, height)))
            x = from_bytes(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            began = time.process_time()
            x0 = encode_latents(vae, x, torch.device("cpu"))
            between = time.process_time()
            found = decoded(vae, x0)
            encoding.append(between - began)
            decoding.append(time.process_time() - between)
            psnr.append(-10 * ((found - x) / 2).square().mean().log10().item())
    return {
        "autoencoder": type(vae).__name__,
        "n": len(psnr),
        "psnr": {"mean": float(np.mean(psnr)), "least": min(psnr), "most": max(psnr)},
        "encode_cpu_seconds": float(np.median(encoding)),
        "decode_cpu_seconds": float(np.median(decoding)),
    }


def in_validation(photograph: str) -> bool:
    """A fifth of the photographs, always the same."""
    return int(hashlib.md5(photograph.encode()).hexdigest(), 16) % 5 == 0


def measured(right: int, n: int) -> dict[str, Any]:
    share = right / n
    return {"accuracy": share, "standard_error": (share * (1 - share) / n) ** 0.5, "n": n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    crops = commands.add_parser("crops", help="cut the objects out")
    crops.add_argument("--data", required=True, metavar="FILE.zip")
    crops.add_argument("--out", required=True, type=Path)
    score = commands.add_parser("score", help="a model of train-classes on the test crops")
    score.add_argument("--model", required=True)
    score.add_argument("--probe", action="store_true", help="measure its features as well")
    cnn = commands.add_parser("cnn", help="train and score the yardstick")
    cnn.add_argument("--minutes", type=float, default=20.0, help="of CPU time")
    cnn.add_argument("--size", type=int, default=32)
    cnn.add_argument("--width", type=int, default=32)
    cnn.add_argument("--validate", action="store_true", help="on a fifth of the training crops")
    vae = commands.add_parser("vae", help="photographs through an autoencoder and back")
    vae.add_argument("--data", required=True, metavar="FILE.zip")
    vae.add_argument("--vae", required=True, metavar="DIR|HUB_ID")
    for command in (score, cnn):
        command.add_argument("--crops", required=True, type=Path)
    for command in (score, cnn, vae):
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--results", default="photo_classes", help="of bench/results")
    options = parser.parse_args()
    if options.command == "crops":
        count = write_crops(options.data, options.out)
        for name in GROUPS:
            print(f"{name:14} {count['train', name]:4} {count['test', name]:4}")
        return
    torch.set_num_threads(options.threads)
    if options.command == "score":
        row = score_model(options.model, options.crops, options.probe)
    elif options.command == "vae":
        row = round_trip(options.data, options.vae)
    else:
        row = score_cnn(
            options.crops, options.size, options.minutes, options.width, options.validate
        )
    row = {"what": options.command, "threads": options.threads, **row}
    print({key: value for key, value in row.items() if key != "environment"})
    place = row.pop("environment", None) or machine()
    append_line(RESULTS / f"{options.results}.jsonl", row, place)


if __name__ == "__main__":
    main()
