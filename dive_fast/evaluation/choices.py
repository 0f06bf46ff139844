"""Choices among each item's own candidates, written as they come and resumed where they stopped."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dive_fast.core.shortlist import digest
from dive_fast.data.item_lines import ItemLine, read_item_lines
from dive_fast.data.pixel_weights import cropped
from dive_fast.errors import DiveFastError
from dive_fast.evaluation.machine import environment
from dive_fast.evaluation.records import Form
from dive_fast.evaluation.run import Source, run_over, sentence
from dive_fast.evaluation.rundir import RunDirectory
from dive_fast.predict.scores import Choice
from dive_fast.predict.scoring import ImageTextScorer
from dive_fast.strategies import Strategy, resolve_strategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChoiceSummary:
    """What a run came to.

    Attributes:
        n: items with a choice.
        failed: items without, whose records say why.
        candidates_per_item, evaluations_per_item, seconds_per_item: means over those with a choice;
            None without any.
    """

    n: int
    failed: int
    candidates_per_item: float | None
    evaluations_per_item: float | None
    seconds_per_item: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def choose_over(
    scorer: ImageTextScorer,
    items: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    strategy: str | Strategy = "race",
    probes: int | None = None,
    seed: int = 0,
    timesteps: str | None = None,
    weights: str | None = None,
    progress: bool = False,
) -> ChoiceSummary:
    """Chooses for every line of a file of items, and appends one line each to the run's records.

    Run again with the same configuration it resumes: items that have a choice are left out. An item
    that cannot be used is recorded with its error, and the rest go on.

    Args:
        items: a file of JSON objects, one a line: ``id``, ``image``, ``candidates`` and, if wanted,
            ``mask``; see ``read_item_lines``.
        out: the run directory: ``run.json`` and ``results.jsonl``.
        strategy, probes, seed, timesteps, weights: as in ``ImageTextScorer.choose``.
        progress: show a bar.

    Raises:
        DataError: the file is none of items.
        RunError: ``out`` holds another run or a damaged one, or cannot be written.
        DiveFastError: an unknown strategy, or a number of probes that it refuses.
    """
    lines = read_item_lines(items)
    asked = {"strategy": resolve_strategy(strategy, None, {}), "probes": probes, "seed": seed}
    asked |= {"timesteps": timesteps, "weights": weights}
    config = {**scorer.identity(**asked), "items": digest(line.line for line in lines)}
    facts = {"data": os.fspath(items)}
    channels, size, _ = scorer.model.image_shape

    def stream(images: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        given = ((key, *image) for key, image in images)
        return scorer.choose(given, keep_going=True, **asked)

    with RunDirectory.open(out, config, environment(scorer), Form("choice"), facts) as run:
        run_over(
            [Source(line.id, partial(_read, line, channels, size), name=line.id) for line in lines],
            stream,
            run,
            progress=progress,
            record=_record,
        )
        return _summary(run.done())


def _read(line: ItemLine, channels: int, size: int) -> tuple[Any, ...]:
    """What ``choose`` takes beside the key; cropped here, as many items may be on their way.

    Raises:
        ImageError: the image or its mask cannot be used.
    """
    picture, candidates, mask = line.read()
    image, weights = cropped(picture, mask, size, channels)
    return image, candidates, weights


def _record(key: str, answer: Choice | DiveFastError, image: Any) -> Mapping[str, Any]:
    if isinstance(answer, DiveFastError):
        log.warning(sentence(key, answer))
        return {"error": str(answer)}
    return answer.to_dict()


def _summary(records: Mapping[str, Mapping[str, Any]]) -> ChoiceSummary:
    n, sums = 0, {"candidates": 0.0, "evaluations": 0.0, "seconds": 0.0}
    for key in records:
        record = records[key]
        if "error" not in record:
            n += 1
            sums["candidates"] += len(record["candidates"])
            sums["evaluations"] += record["evaluations"]
            sums["seconds"] += record["seconds"]
    means = [total / n if n else None for total in sums.values()]
    return ChoiceSummary(n, len(records) - n, *means)
