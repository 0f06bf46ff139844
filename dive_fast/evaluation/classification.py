"""Accuracy of a classifier on labelled images, written as it comes and resumed where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dive_fast
from dive_fast.core.shortlist import digest
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.data import DataSet, Example
from dive_fast.errors import ImageError
from dive_fast.evaluation.rundir import RunDirectory, is_finished
from dive_fast.models.files.sidecar import fitted_shortlist
from dive_fast.predict.calibration import expected_calibration_error
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.strategies import Strategy, Task, resolve_strategy


@dataclass(frozen=True)
class Summary:
    """What an evaluation found; ``None`` stands for figures that no image supports.

    Attributes:
        accuracy: share of the images answered right.
        standard_error: of the accuracy, sqrt(p (1 - p) / n).
        mean_per_class_accuracy: mean over the classes that occur.
        expected_calibration_error: mean distance of confidence and accuracy, over 15 bins.
        n: images answered.
        failed: images that could not be read.
        evaluations_per_image: forwards plus backwards of the network.
        seconds_per_image: of wall time.
        fill_rate: share of the batches' rows that were used, over what this process computed.
    """

    accuracy: float | None
    standard_error: float | None
    mean_per_class_accuracy: float | None
    expected_calibration_error: float | None
    n: int
    failed: int
    evaluations_per_image: float | None
    seconds_per_image: float | None
    fill_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate(
    classifier: DiffusionClassifier,
    data: DataSet,
    out: str | Path,
    *,
    strategy: str | Strategy | None = None,
    preset: str | None = None,
    probes: int | None = None,
    seed: int = 0,
    timesteps: str | TimestepWeights | None = None,
    progress: bool = False,
) -> Summary:
    """Classifies every image of ``data`` and appends one line each to ``out/results.jsonl``.

    ``out/run.json`` is written first. Run again with the same configuration it resumes: images that
    have a line are not computed again. An image that cannot be read is recorded with its error, and
    the rest go on.

    Raises:
        RunError: ``out`` holds another run, or cannot be written.
        DiveFastError: an unknown strategy, preset or number of probes.
    """
    chosen = resolve_strategy(strategy, preset, {})
    probe_list = classifier.probe_list(chosen, probes, seed, timesteps)
    weights = classifier.learned_timesteps(chosen, probes, timesteps)
    # A strategy may refuse the probes when it starts: before the run directory is made.
    next(chosen.search(Task(classifier.model.vocabulary, probe_list, seed)), None)
    config = {
        "model": classifier.model.identity(),
        "data": data.identity(),
        "strategy": {"name": chosen.name, **_settings(chosen)},
        "probes": len(probe_list),
        "timesteps": "uniform" if weights is None else weights.to_dict(),
        "beta": classifier.model.beta,
        "seed": seed,
    }
    if (shortlist := fitted_shortlist(classifier.model)) is not None:
        config["shortlist"] = digest(map(str, shortlist.to_dict().items()))
    # Only what changes answers: a run may go on under another cache, but not another precision.
    if engine := classifier.options.identity():
        config["engine"] = engine
    with RunDirectory.open(out, config, environment(classifier)) as run:
        todo = [example for example in data.examples if not run.finished(example.id)]
        with tqdm(
            total=len(data.examples),
            initial=len(data.examples) - len(todo),
            unit="image",
            disable=not progress,
        ) as bar:
            latents = _latents(classifier, todo, run, bar)
            stream = classifier.stream(
                latents=latents, strategy=chosen, probes=probes, seed=seed, timesteps=timesteps
            )
            for example, answer in stream:
                # to_dict() calls the answer's name "label"; in a record the label is the truth.
                record = {"id": example.id, **answer.to_dict(), "label": example.label}
                record["prediction"] = record.pop("index")
                run.append(record)
                bar.update()
        summary = summarise(_in_order(run.done(), data.examples))
        return dataclasses.replace(summary, fill_rate=classifier.last_run.fill_rate)


def summarise(records: Sequence[Mapping[str, Any]]) -> Summary:
    """The figures over records of ``results.jsonl``."""
    good = [record for record in records if "error" not in record]
    failed = len(records) - len(good)
    if not good:
        return Summary(None, None, None, None, 0, failed, None, None)
    correct = [record["prediction"] == record["label"] for record in good]
    right: dict[int, list[bool]] = {}
    for record, hit in zip(good, correct, strict=True):
        right.setdefault(record["label"], []).append(hit)
    n = len(good)
    p = sum(correct) / n
    confidence = [record["probability"] for record in good]
    return Summary(
        accuracy=p,
        standard_error=math.sqrt(p * (1 - p) / n),
        mean_per_class_accuracy=sum(sum(c) / len(c) for c in right.values()) / len(right),
        expected_calibration_error=expected_calibration_error(confidence, correct),
        n=n,
        failed=failed,
        evaluations_per_image=sum(record["evaluations"] for record in good) / n,
        seconds_per_image=sum(record["seconds"] for record in good) / n,
    )


def read_records(out: str | Path) -> dict[str, dict[str, Any]]:
    """The finished records of a run directory by image id; a torn last line is left out."""
    records = {}
    for line in (Path(out) / "results.jsonl").read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            record = json.loads(line)
            if not is_finished(records, record["id"]):
                records[record["id"]] = record
    return records


def machine() -> dict[str, Any]:
    """Versions, machine and commit, for the record; a run may be resumed under others."""
    import diffusers

    return {
        "dive_fast": dive_fast.__version__,
        "commit": _commit(),
        "torch": str(torch.__version__),  # its own class cannot be loaded weights-only
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def environment(classifier: DiffusionClassifier) -> dict[str, Any]:
    """``machine()`` and how the classifier runs on it."""
    return {
        **machine(),
        "model": classifier.model.name,
        "device": str(classifier.model.device),
        "batch_size": classifier.batch_size,
        "engine": dataclasses.asdict(classifier.options),
    }


def _latents(
    classifier: DiffusionClassifier, todo: Sequence[Example], run: RunDirectory, bar: tqdm
) -> Iterator[tuple[Example, torch.Tensor]]:
    """Reads and encodes images one by one; those that cannot be read go straight to the record."""
    for example in todo:
        try:
            x0 = classifier.encode([example.load()])[0]
        except ImageError as error:
            # The message begins with the path, where there is one.
            name = "" if example.id in str(error) else f"{example.id}: "
            tqdm.write(f"dive-fast: {name}{error}", file=sys.stderr)
            run.append({"id": example.id, "label": example.label, "error": str(error)})
            bar.update()
            continue
        yield example, x0


def _in_order(done: Mapping[str, dict], examples: Sequence[Example]) -> list[dict]:
    return [done[example.id] for example in examples if example.id in done]


def _settings(strategy: Any) -> dict[str, Any]:
    """A strategy's settings as JSON; tensors cannot be given on the command line."""
    values = dataclasses.asdict(strategy) if dataclasses.is_dataclass(strategy) else {}
    return {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
