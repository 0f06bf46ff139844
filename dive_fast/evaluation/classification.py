"""Accuracy of a classifier on labelled images, written as it comes and resumed where it stopped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dive_fast.core.head import Head
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.data import DataSet, Example
from dive_fast.evaluation.machine import environment
from dive_fast.evaluation.records import Form, check_figures
from dive_fast.evaluation.run import Source, run_over
from dive_fast.evaluation.rundir import RunDirectory
from dive_fast.evaluation.shards import Shard, as_shard
from dive_fast.predict.arguments import as_head
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
    head: Head | str | Path | None = None,
    progress: bool = False,
    shard: Shard | str | None = None,
) -> Summary:
    """Classifies every image of ``data`` and appends one line each to ``out/results.jsonl``.

    ``out/run.json`` is written first. Run again with the same configuration it resumes: images that
    have a line are not computed again. An image that cannot be read is recorded with its error, and
    the rest go on.

    Args:
        shard: only every N-th image: a ``Shard`` or its text, such as "3/16", or "auto" in a
            process of torchrun or srun. The run then lies in a folder of ``out`` of its own, and
            ``merging.merge`` makes one run of all.

    Raises:
        RunError: ``out`` holds another run or a damaged one, or cannot be written.
        DiveFastError: an unknown strategy, preset or number of probes.
    """
    chosen = resolve_strategy(strategy, preset, {})
    probe_list = classifier.probe_list(chosen, probes, seed, timesteps)
    head = as_head(head, chosen, classifier.model)
    # A strategy may refuse the probes when it starts: before the run directory is made.
    next(chosen.search(Task(classifier.model.vocabulary, probe_list, seed, head=head)), None)
    asked = {"strategy": chosen, "probes": probes, "seed": seed, "timesteps": timesteps}
    asked["head"] = head
    config = {**classifier.identity(**asked), "data": data.identity()}
    out, data, part, facts = as_shard(out, data, data.ids, shard)
    config.update(part)
    facts.update(names=classifier.names, data=data.where)
    sources = (
        Source(e.id, partial(_latent, classifier, e), {"truth": e.label}, name=e.id)
        for e in data.examples
    )
    labels = data.labels
    truths = None if labels is None else dict(zip(data.ids, labels.tolist(), strict=True))
    form = Form("classification", classifier.names, truths)

    def stream(latents: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, Any]]:
        return classifier.stream(latents=latents, **asked)

    with RunDirectory.open(out, config, environment(classifier), form, facts) as run:
        run_over(sources, stream, run, progress=progress, total=len(data.examples))
        done = run.done()
        summary = summarise([done[e.id] for e in data.examples if e.id in done])
        return dataclasses.replace(summary, fill_rate=classifier.last_run.fill_rate)


def _latent(classifier: DiffusionClassifier, example: Example) -> torch.Tensor:
    return classifier.encode([example.load()])[0]


def summarise(records: Sequence[Mapping[str, Any]]) -> Summary:
    """The figures over records of ``results.jsonl``.

    Raises:
        RunError: a record lacks what the figures are made of, such as its ``truth``.
    """
    for record in records:
        check_figures(record)
    good = [record for record in records if "error" not in record]
    failed = len(records) - len(good)
    if not good:
        return Summary(None, None, None, None, 0, failed, None, None)
    correct = [record["index"] == record["truth"] for record in good]
    right: dict[int, list[bool]] = {}
    for record, hit in zip(good, correct, strict=True):
        right.setdefault(record["truth"], []).append(hit)
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
