"""Runs over tasks of images and texts (SugarCrepe, Winoground), resumed where they stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dive_fast.core.files import replacing
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.data.labelled import chosen
from dive_fast.data.reading import Pixels
from dive_fast.data.tasks import TaskData, TaskItem
from dive_fast.errors import DiveFastError, shown
from dive_fast.evaluation.logs import logged
from dive_fast.evaluation.machine import environment
from dive_fast.evaluation.outputs import SUMMARY, TABLE, write_csv
from dive_fast.evaluation.records import Form
from dive_fast.evaluation.run import Source, run_over
from dive_fast.evaluation.rundir import RunDirectory
from dive_fast.evaluation.runfiles import cannot, for_json
from dive_fast.evaluation.task_scores import (
    IMAGE_RULES,
    SCORES,
    TaskSummary,
    pair_scores,
    summarise_task,
)
from dive_fast.logs import LogTo, check_log_to
from dive_fast.predict.scores import Choice, Scores
from dive_fast.predict.scoring import ImageTextScorer
from dive_fast.strategies import Auto, Enumerate, Strategy, resolve_strategy

# Of items of one image: few candidates, of which enumeration's answer shall be kept.
DEFAULT = Auto(min_agreement=0.99)
COLUMNS = ("id", "category", *SCORES, "evaluations", "seconds", "error")


def evaluate_task(
    scorer: ImageTextScorer,
    data: TaskData,
    out: str | Path,
    *,
    strategy: str | Strategy | None = None,
    probes: int | None = None,
    seed: int = 0,
    timesteps: str | TimestepWeights | None = None,
    image_rule: str = "null",
    limit: int | None = None,
    log_to: LogTo | None = None,
    progress: bool = False,
) -> TaskSummary:
    """Scores every item of a task and appends one line each to ``out/results.jsonl``.

    Run again with the same configuration it resumes: items that have a line are not computed again.
    An item with an image that cannot be read is recorded with its error, and the rest go on.

    Args:
        strategy: how the text of an image is found, by name or as an object; ``DEFAULT`` if None.
            Tasks with an image score need every loss: they are enumerated.
        probes, seed, timesteps: as ``ImageTextScorer.choose`` has them.
        image_rule: "null" compares L(x, t) - L(x, no text) across images, "raw" L(x, t).
        limit: a random subset of so many items.
        log_to: as ``evaluate`` has it.

    Returns:
        The summary, which is also in ``out/summary.json``; ``out/results.csv`` is a table of the
        items.

    Raises:
        RunError: ``out`` holds another run or a damaged one, or cannot be written.
        DiveFastError: an unknown strategy or rule, one that does not suit the items, or a wrong
            number.
    """
    if image_rule not in IMAGE_RULES:
        raise DiveFastError(
            f"expected image_rule {' or '.join(map(repr, IMAGE_RULES))}, got {shown(image_rule)}."
        )
    check_log_to(log_to)
    items = _limited(data.items, limit, seed)
    enumerated = any(len(item.images) > 1 for item in items)
    asked: dict[str, Any] = {"probes": probes, "seed": seed, "timesteps": timesteps}
    by = _strategy(strategy, enumerated)
    config = {
        **scorer.identity(strategy=by, **asked),
        "task": data.spec.to_dict(),
        "files": data.files,
        "limit": limit,
        **({"image_rule": image_rule} if enumerated else {}),
    }
    facts = {"pictures": data.pictures.path, "citation": data.spec.citation}
    if enumerated:
        stream, asked["unconditional"] = _enumerated, image_rule == "null"
    else:
        stream, asked["strategy"] = _stream, by
    with (
        RunDirectory.open(out, config, environment(scorer), Form("task"), facts) as run,
        logged(run, log_to, config) as records,
    ):
        run_over(
            [_source(scorer, data, item) for item in items],
            partial(stream, scorer, {item.id: item for item in items}, asked),
            records,
            progress=progress,
            record=_record,
        )
        done = run.done()
        found = [done[item.id] for item in items]
        summary = summarise_task(data.spec.name, found)
        _write(run.path, summary, found, config)
        records.finish(summary.to_dict())
        return summary


def _strategy(strategy: str | Strategy | None, enumerated: bool) -> Strategy:
    if strategy is None:
        strategy = "enumerate" if enumerated else DEFAULT
    chosen = resolve_strategy(strategy, None, {})
    if enumerated and chosen != Enumerate():
        raise DiveFastError(
            "items of several images are compared by all of their losses: expected the strategy "
            f"enumerate or none, got {chosen.name}."
        )
    return chosen


def _limited(items: tuple[TaskItem, ...], limit: int | None, seed: int) -> list[TaskItem]:
    if limit is not None and limit < 1:
        raise DiveFastError(f"expected a limit of at least 1 item, got {limit}.")
    return [items[row] for row in chosen(len(items), limit, seed)]


def _source(scorer: ImageTextScorer, data: TaskData, item: TaskItem) -> Source:
    channels, size, _ = scorer.model.image_shape
    reads = [Pixels(partial(data.pictures.image, name), size, channels) for name in item.images]
    facts = {} if item.category is None else {"category": item.category}
    return Source(item.id, lambda: [read() for read in reads], facts, name=item.id)


def _stream(
    scorer: ImageTextScorer,
    items: Mapping[str, TaskItem],
    asked: Mapping[str, Any],
    pairs: Iterable[tuple[str, list[torch.Tensor]]],
) -> Iterator[tuple[str, Choice | DiveFastError]]:
    """The choice of every item of one image, by any strategy.

    Args:
        pairs: items' ids and their images.
    """
    wanted = ((key, image, items[key].texts) for key, (image,) in pairs)
    return scorer.choose(wanted, keep_going=True, **asked)


def _enumerated(
    scorer: ImageTextScorer,
    items: Mapping[str, TaskItem],
    asked: Mapping[str, Any],
    pairs: Iterable[tuple[str, list[torch.Tensor]]],
) -> Iterator[tuple[str, Scores]]:
    """All losses of every item, on all probes; ``asked`` is of ``score``."""
    for key, images in pairs:
        yield key, scorer.score(images, items[key].texts, **asked)


def _record(key: str, answer: Choice | Scores | DiveFastError, images: Any) -> Mapping[str, Any]:
    if isinstance(answer, DiveFastError):
        return {"error": str(answer)}
    losses, null = np.atleast_2d(np.asarray(answer.losses, dtype=np.float64)), None
    if isinstance(answer, Choice):
        n_probes = answer.n_probes.tolist()
    else:
        null, n_probes = answer.unconditional, answer.n_probes
    found = {
        "losses": losses.tolist(),
        "n_probes": n_probes,
        "evaluations": answer.evaluations,
        "seconds": answer.seconds,
    }
    if null is not None:
        null = np.asarray(null, dtype=np.float64)
        found["null_losses"] = null.tolist()
    return {"right": pair_scores(losses, null), **found}


def _write(
    path: Path, summary: TaskSummary, records: list[Mapping[str, Any]], config: Mapping[str, Any]
) -> None:
    content = for_json({"dataset": summary.task, "config": config, **summary.to_dict()})
    try:
        with replacing(path / SUMMARY) as file:
            file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise cannot("written", path / SUMMARY, error) from error
    write_csv(path / TABLE, COLUMNS, map(_row, records))


def _row(record: Mapping[str, Any]) -> list[Any]:
    right = record.get("right", {})
    scores = [int(right[name]) if name in right else "" for name in SCORES]
    cost = [record.get(name, "") for name in ("evaluations", "seconds")]
    return [record["id"], record.get("category", ""), *scores, *cost, record.get("error", "")]
