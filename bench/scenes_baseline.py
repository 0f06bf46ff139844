"""The baseline of detection on `scenes`: a plain discriminative detector, trained and scored.

    python -m bench.scenes_baseline train --out DIR
    python -m bench.scenes_baseline score --model DIR --limit 200

The detector (`bench/baselines/one_stage.py`) has the size of the zoo's `scenes`, sees the same kind
of batches, 64 fresh scenes a step, and takes about as long on one core. A training that was cut off
goes on when the same command is started again.

`score` searches the first N held-out scenes one by one and appends a line to
bench/results/scenes_baseline.jsonl. Its "scores" are of the boxes as predicted; "scores_on_grid" of
the same boxes with corners rounded to the grid of the scenes, which a layout's boxes lie on anyway.
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
    as_input,
    assign,
    decode,
    detection_loss,
)
from bench.records import RESULTS, append_line
from dive_fast.data.scenes import (
    CANVAS,
    NAMES,
    STEP,
    SceneMaker,
    Scenes,
    load_scenes,
    scenes_dataset,
)
from dive_fast.errors import DiveFastError, ModelError, RunError
from dive_fast.evaluation.coco_scores import score
from dive_fast.evaluation.machine import machine
from dive_fast.predict.detections import Detections
from dive_fast.training import loop
from dive_fast.training.loop import STATE, prepare_directory
from dive_fast.training.state import Course, write_tensors

DETECTOR = "detector.pt"
COMMAND = "python -m bench.scenes_baseline"
STEPS = 7500
WATCHED = 100  # fixed scenes of training digits, whose AP the log states


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig(Course):
    """What the detector is made of and how long it learns."""

    channels: tuple[int, ...] = (64, 128, 288)
    blocks: tuple[int, ...] = (2, 2, 2)
    width: int = 96
    steps: int = STEPS
    weight_decay: float = 0.05

    def build(self) -> OneStageDetector:
        """The untrained network."""
        return OneStageDetector(len(NAMES), self.channels, self.blocks, self.width)


def train(out: Path, config: BaselineConfig, progress: bool = True) -> None:
    """Trains a detector into ``out/detector.pt``, with averaged (EMA) weights.

    The log, ``out/training.jsonl``, also states their AP on 100 fixed scenes of training digits.

    Raises:
        RunError: ``out`` holds a finished detector or another training, or cannot be written.
        DiveFastError: fewer than 1 step, or scikit-learn or pycocotools are missing.
    """
    if config.steps < 1:
        raise DiveFastError(f"expected at least 1 step, got {config.steps}.")
    prepare_directory(out)
    if (out / DETECTOR).exists():
        raise RunError(f"{out} holds a finished detector; choose another --out.")
    make, watched = SceneMaker("train"), load_scenes("train", WATCHED)
    torch.manual_seed(config.seed)
    net = config.build().to(memory_format=torch.channels_last).train()
    finished = loop.train(
        net,
        lambda step, _: _loss(net, make(config.batch_size, (config.seed, step)), config),
        config,
        out,
        held_out=lambda: {"AP": score_scenes(net, watched)["scores"]["AP"]},
        progress=progress,
    )
    content = {
        "config": dataclasses.asdict(config),
        "model": net.state_dict(),
        "training": {
            "command": f"{COMMAND} train --out DIR --steps {config.steps} --seed {config.seed}",
            "cpu_seconds": finished.cpu_seconds,
            "seconds": finished.seconds,
            **machine(),
        },
    }
    write_tensors(out / DETECTOR, content)
    (out / STATE).unlink()  # nothing is to be resumed from it now


def _loss(net: OneStageDetector, made: Scenes, config: BaselineConfig) -> Tensor:
    boxes, class_ids = torch.from_numpy(made.boxes).float(), torch.from_numpy(made.class_ids)
    targets, images = assign(boxes, class_ids, CANVAS, CANVAS), _images(made)
    with config.autocast(images.device):
        logits, distances = net(images)
    return detection_loss(Dense(logits.float(), distances.float()), targets, CANVAS, CANVAS)


def _images(made: Scenes) -> Tensor:
    images = as_input(torch.from_numpy(made.images))
    return images.contiguous(memory_format=torch.channels_last)


def load_detector(directory: Path) -> tuple[OneStageDetector, dict]:
    """A finished detector, and what is known of its training.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    path = directory / DETECTOR
    if not path.is_file():
        raise ModelError(f"expected a finished detector in {directory}, got no {DETECTOR}.")
    try:
        content = torch.load(path, weights_only=True)
        config = BaselineConfig(**content["config"])
        net = config.build()
        net.load_state_dict(content["model"])
        facts = {"steps": config.steps, "training": content["training"]}
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        raise ModelError(f"{path} is damaged or no detector of this benchmark.") from error
    return net.to(memory_format=torch.channels_last).eval(), facts


def score_scenes(net: OneStageDetector, made: Scenes) -> dict:
    """The twelve COCO numbers of a detector that sees the scenes one by one.

    Returns:
        "scores", "scores_on_grid", "n", "seconds_per_image" (network, boxes and suppression) and
        "objects_per_image" (boxes of any score).
    """
    found, seconds = [], 0.0
    for index in range(len(made.images)):
        start = time.perf_counter()
        found.append(_detect(net, Scenes(*(array[index : index + 1] for array in made))))
        seconds += time.perf_counter() - start
    n = len(found)
    return {
        "scores": coco_scores(found, made),
        "scores_on_grid": coco_scores([_on_grid(one) for one in found], made),
        "n": n,
        "seconds_per_image": seconds / n,
        "objects_per_image": sum(len(one.boxes) for one in found) / n,
    }


@torch.inference_mode()
def _detect(net: OneStageDetector, scene: Scenes) -> Found:
    return decode(net(_images(scene)), CANVAS, CANVAS)[0]


def _on_grid(found: Found) -> Found:
    """The same boxes with corners on the scenes' grid, less those that have no area there."""
    boxes = (found.boxes / STEP).round() * STEP
    real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Found(boxes[real], found.class_ids[real], found.scores[real])


def coco_scores(found: Sequence[Found], made: Scenes) -> dict[str, float | None]:
    """The twelve COCO numbers of what was found in each of the scenes."""
    dataset = scenes_dataset(made, Path(), "scenes")
    results = []
    for image, one in zip(dataset.images, found, strict=True):
        detections = Detections(one.boxes, one.class_ids, one.scores, NAMES)
        results += detections.to_coco(image.id, dataset.category_ids)
    return score(dataset, results)


def _train(options: argparse.Namespace) -> None:
    train(options.out, BaselineConfig(steps=options.steps, seed=options.seed))


def _score(options: argparse.Namespace) -> None:
    held_out = load_scenes("test", options.limit)  # refuses the limit before anything is loaded
    net, facts = load_detector(options.model)
    row = {
        "command": f"{COMMAND} score --model DIR --limit {options.limit}",
        "parameters": sum(p.numel() for p in net.parameters()),
        **facts,
        **score_scenes(net, held_out),
    }
    versions = {"pycocotools": importlib.metadata.version("pycocotools")}
    append_line(options.out, row, {**machine(), **versions})
    print(json.dumps(row, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="train the detector, or go on with it")
    command.add_argument("--out", type=Path, required=True, help="directory of the detector")
    command.add_argument("--steps", type=int, default=STEPS)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=_train)
    command = commands.add_parser("score", help="score it on the held-out scenes")
    command.add_argument("--model", type=Path, required=True, help="directory of the detector")
    command.add_argument("--limit", type=int, default=200, help="the first N held-out scenes")
    command.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "scenes_baseline.jsonl",
        help="file of the record, which a line is appended to",
    )
    command.set_defaults(run=_score)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after bad input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DiveFastError as error:
        print(f"scenes_baseline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
