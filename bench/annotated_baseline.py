"""The baseline of detection on annotated photographs: a discriminative detector, trained as long.

    python -m bench.annotated_baseline train --annotations TILES/train.json --images TILES/images \
        --size 64 --max-objects 8 --steps N --out DIR
    python -m bench.annotated_baseline score --model DIR --data TILES/test.json \
        --images TILES/images --limit 30

The detector (`bench/baselines/one_stage.py`) sees the very batches that `dive-fast train-layout`
with these options draws: the same pictures and pixels, flips, held-out part and chances of rare
classes. `--steps` decides how long it takes; compare the CPU times that both trainings print. A
training that was cut off goes on when the same command is started again.

`score` appends a line to bench/results/blood_cells.jsonl or where `--result` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.baselines.one_stage import (
    Dense,
    Found,
    OneStageDetector,
    assign,
    decode,
    detection_loss,
)
from bench.records import RESULTS, append_line
from dive_fast.core.layouts import LayoutFormat
from dive_fast.data.coco import (
    CocoDataset,
    class_categories,
    held_out_split,
    read_coco,
    read_images,
)
from dive_fast.data.images import squashed_tensor
from dive_fast.errors import DiveFastError
from dive_fast.evaluation.coco_scores import score_boxes
from dive_fast.evaluation.machine import machine
from dive_fast.predict.detections import Detections
from dive_fast.priors.tokens import fitting_layouts
from dive_fast.training import loop
from dive_fast.training.annotated import (
    MOST_HELD_OUT,
    PIXELS_PER_STEP,
    config_of_size,
    draw_flipped,
)
from dive_fast.training.layout_losses import to_x0
from dive_fast.training.loop import STATE, prepare_directory
from dive_fast.training.state import Course, write_tensors

DETECTOR = "detector.pt"
COMMAND = "python -m bench.annotated_baseline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorConfig(Course):
    """What the detector is made of and how long it learns."""

    names: tuple[str, ...]
    size: int
    channels: tuple[int, ...] = (32, 64, 128, 256)
    blocks: tuple[int, ...] = (1, 2, 2, 2)
    width: int = 96
    weight_decay: float = 0.05

    def build(self) -> OneStageDetector:
        """The untrained network, for pictures in colour."""
        return OneStageDetector(len(self.names), self.channels, self.blocks, self.width, 3)


def train(dataset: CocoDataset, out: Path, max_objects: int, config: DetectorConfig) -> None:
    """Trains a detector into ``out/detector.pt``, with averaged (EMA) weights."""
    prepare_directory(out)
    layout = LayoutFormat.compact(dataset.names, max_objects, config.size // PIXELS_PER_STEP + 1)
    fitting = fitting_layouts(dataset, layout)
    chosen = tuple(dataset.images[i] for i in fitting.images.tolist())
    dataset = dataclasses.replace(dataset, images=chosen)
    pixels = torch.from_numpy(read_images(dataset, config.size, 3))
    rows, held_out = held_out_split(len(pixels), dataset.source, MOST_HELD_OUT)
    like_ours = dataclasses.replace(
        config_of_size(config.size), seed=config.seed, batch_size=config.batch_size
    )
    draw = draw_flipped(pixels, fitting.tokens, rows, layout, like_ours)
    torch.manual_seed(config.seed)
    net = config.build().to(memory_format=torch.channels_last).train()

    def loss_of_batch(images: Tensor, tokens: Tensor) -> Tensor:
        class_ids, sides = layout.read(tokens)
        with config.autocast(images.device):
            logits, distances = net(_input(images))
        targets = assign(sides.float() * PIXELS_PER_STEP, class_ids, config.size, config.size)
        return detection_loss(Dense(logits.float(), distances.float()), targets, *[config.size] * 2)

    shown = pixels[held_out], fitting.tokens[held_out]
    finished = loop.train(
        net,
        lambda step, _: loss_of_batch(*draw(step)),
        config,
        out,
        held_out=lambda: {"held_out": float(loss_of_batch(*shown))},
    )
    facts = {"cpu_seconds": finished.cpu_seconds, "seconds": finished.seconds, **machine()}
    content = {"config": dataclasses.asdict(config), "model": net.state_dict(), "training": facts}
    write_tensors(out / DETECTOR, content)
    (out / STATE).unlink()  # nothing is to be resumed from it now
    print(f"{out}: {finished.cpu_seconds / 60:.1f} minutes of CPU time")


def _input(images: Tensor) -> Tensor:
    return to_x0(images).contiguous(memory_format=torch.channels_last)


def score(model: Path, dataset: CocoDataset) -> dict:
    """The COCO numbers of a detector that sees the images one by one."""
    content = torch.load(model / DETECTOR, weights_only=True)
    config = DetectorConfig(**content["config"])
    net = config.build()
    net.load_state_dict(content["model"])
    net = net.to(memory_format=torch.channels_last).eval()
    categories = class_categories(dataset, config.names)
    results, seconds = [], 0.0
    for image in dataset.images:
        picture = image.read()
        start = time.perf_counter()
        found = _detect(net, squashed_tensor(picture, config.size, 3), config.size)
        seconds += time.perf_counter() - start
        width, height = picture.size
        boxes = found.boxes * torch.tensor([width, height, width, height]) / config.size
        detections = Detections(boxes, found.class_ids, found.scores, config.names)
        results += detections.to_coco(image.id, categories)
    scores = score_boxes(dataset, results)
    n = len(dataset.images)
    return {
        **scores.numbers,
        "AP_per_class": scores.classes,
        "n": n,
        "seconds_per_image": seconds / n,
        "steps": config.steps,
        "parameters": sum(p.numel() for p in net.parameters()),
        "training": content["training"],
    }


@torch.inference_mode()
def _detect(net: OneStageDetector, x: Tensor, size: int) -> Found:
    images = x[None].contiguous(memory_format=torch.channels_last)
    return decode(net(images), size, size)[0]


def _train(options: argparse.Namespace) -> None:
    dataset = read_coco(options.annotations, options.images)
    config = DetectorConfig(
        names=dataset.names,
        size=options.size,
        steps=options.steps,
        batch_size=options.batch_size,
        bf16=options.bf16,
    )
    train(dataset, options.out, options.max_objects, config)


def _score(options: argparse.Namespace) -> None:
    # The same images as evaluate --limit takes.
    dataset = read_coco(options.data, options.images).select(options.limit)
    row = {
        "model": f"one-stage detector, {options.tag}" if options.tag else "one-stage detector",
        "data": dataset.identity(),
        **score(options.model, dataset),
        "command": f"{COMMAND} score --model DIR --data {options.data.name} --images TILES/images",
    }
    versions = {"pycocotools": importlib.metadata.version("pycocotools")}
    append_line(options.result, row, {**machine(), **versions})
    print(json.dumps(row, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="train the detector, or go on with it")
    command.add_argument("--annotations", required=True)
    command.add_argument("--images", required=True)
    command.add_argument("--out", type=Path, required=True, help="directory of the detector")
    command.add_argument("--size", type=int, default=32)
    command.add_argument("--max-objects", type=int, default=30)
    command.add_argument("--steps", type=int, required=True)
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--bf16", action="store_true")
    command.set_defaults(run=_train)
    command = commands.add_parser("score", help="score it on annotated images")
    command.add_argument("--model", type=Path, required=True, help="directory of the detector")
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--images", required=True)
    command.add_argument("--limit", type=int, help="N images, those of evaluate --limit")
    command.add_argument("--tag", help="what the model is called in the row")
    command.add_argument("--result", type=Path, default=RESULTS / "blood_cells.jsonl")
    command.set_defaults(run=_score)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after bad input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DiveFastError as error:
        print(f"annotated_baseline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
