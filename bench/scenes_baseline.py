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
import copy
import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.baselines.one_stage import (
    Found,
    OneStageDetector,
    as_input,
    assign,
    decode,
    detection_loss,
)
from bench.records import RESULTS, append_line
from dive_fast.data.scenes import CANVAS, NAMES, STEP, SceneMaker, Scenes, load_scenes
from dive_fast.data.scenes_coco import scenes_dataset
from dive_fast.errors import DiveFastError, ModelError, RunError
from dive_fast.evaluation.coco_scores import score
from dive_fast.evaluation.machine import machine
from dive_fast.predict.detections import Detections
from dive_fast.training.loop import (
    STATE,
    average_into,
    log_losses,
    prepare_directory,
    read_state,
    take_step,
    write_state,
)

DETECTOR = "detector.pt"
COMMAND = "python -m bench.scenes_baseline"
STEPS = 7500
LOG_EVERY = 250
STATE_EVERY = 250
WATCHED = 100  # fixed scenes of training digits, whose AP the log states


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """What the detector is made of and how long it learns."""

    channels: tuple[int, ...] = (64, 128, 288)
    blocks: tuple[int, ...] = (2, 2, 2)
    width: int = 96
    steps: int = STEPS
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    weight_decay: float = 0.05
    ema_decay: float = 0.999
    seed: int = 0

    def build(self) -> OneStageDetector:
        """The untrained network."""
        return OneStageDetector(len(NAMES), self.channels, self.blocks, self.width)


def train(out: Path, config: BaselineConfig, say: Callable[[str], None] = print) -> None:
    """Trains a detector into ``out/detector.pt``, with averaged (EMA) weights.

    Every 250 steps the whole state goes to ``out/training.pt`` and a line to ``say`` and to
    ``out/training.jsonl``: the loss, and the AP of the averaged weights on 100 fixed scenes of
    training digits.

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
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=config.weight_decay)
    settings = dataclasses.asdict(config)
    step, cpu_seconds, seconds, running = 0, 0.0, 0.0, None
    state = read_state(out, settings)
    if state is not None:
        step, cpu_seconds, seconds = state["step"], state["cpu_seconds"], state["seconds"]
        running = state["loss"]
        net.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        say(f"goes on at step {step}")
    floats = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    ema = [tensor for tensor in average.state_dict().values() if tensor.is_floating_point()]
    cpu_before, before = time.process_time() - cpu_seconds, time.perf_counter() - seconds
    while step < config.steps:
        loss = _loss(net, make(config.batch_size, (config.seed, step)))
        take_step(optimizer, loss, step, config)
        average_into(ema, floats, step, config.ema_decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        step += 1
        if step % LOG_EVERY == 0:
            ap = score_scenes(average, watched)["scores"]["AP"]
            log_losses(out, step, {"loss": running, "AP": ap})
            spent = (time.process_time() - cpu_before) / 60
            say(f"step {step} of {config.steps}: loss {running:.4f}, AP {ap:.3f}, {spent:.1f} min")
        if step % STATE_EVERY == 0 or step == config.steps:
            spent = {
                "cpu_seconds": time.process_time() - cpu_before,
                "seconds": time.perf_counter() - before,
            }
            state = {
                "config": settings,
                "step": step,
                "loss": running,
                "model": net.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                **spent,
            }
            write_state(out, state)
    _finish(out, average, settings, spent)


def _loss(net: OneStageDetector, made: Scenes) -> Tensor:
    boxes, class_ids = torch.from_numpy(made.boxes).float(), torch.from_numpy(made.class_ids)
    targets = assign(boxes, class_ids, CANVAS, CANVAS)
    return detection_loss(net(_images(made)), targets, CANVAS, CANVAS)


def _images(made: Scenes) -> Tensor:
    images = as_input(torch.from_numpy(made.images))
    return images.contiguous(memory_format=torch.channels_last)


def _finish(out: Path, average: OneStageDetector, settings: dict, spent: dict) -> None:
    """Writes the detector, and removes the state that nothing is to be resumed from now."""
    partial = out / f"{DETECTOR}.partial"
    content = {
        "config": settings,
        "model": average.state_dict(),
        "training": {
            "command": f"{COMMAND} train --out DIR "
            f"--steps {settings['steps']} --seed {settings['seed']}",
            **spent,
            **machine(),
        },
    }
    try:
        torch.save(content, partial)
        os.replace(partial, out / DETECTOR)
    except (OSError, RuntimeError) as error:
        raise RunError(f"{out / DETECTOR} cannot be written: is the disk full?") from error
    (out / STATE).unlink()


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
    config = BaselineConfig(steps=options.steps, seed=options.seed)
    train(options.out, config, lambda line: print(line, flush=True))


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
