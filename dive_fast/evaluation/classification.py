"""Accuracy of a classifier on labelled images, written as it comes and resumed where it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dive_fast.core.head import Head
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.data import DataSet, Example
from dive_fast.evaluation.grouping import expect_columns, facts_of
from dive_fast.evaluation.machine import environment
from dive_fast.evaluation.outputs import write_outputs
from dive_fast.evaluation.records import Form
from dive_fast.evaluation.run import Source, run_over
from dive_fast.evaluation.rundir import RunDirectory
from dive_fast.evaluation.shards import Shard, as_shard
from dive_fast.evaluation.summary import Summary
from dive_fast.predict.arguments import as_head
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.strategies import Strategy, Task, resolve_strategy


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
    group_by: Sequence[str] = (),
) -> Summary:
    """Classifies every image of ``data`` and appends one line each to ``out/results.jsonl``.

    ``out/run.json`` is written first. Run again with the same configuration it resumes: images that
    have a line are not computed again. An image that cannot be read is recorded with its error, and
    the rest go on.

    Args:
        shard: only every N-th image: a ``Shard`` or its text, such as "3/16", or "auto" in a
            process of torchrun or srun. The run then lies in a folder of ``out`` of its own, and
            ``merging.merge`` makes one run of all.
        group_by: columns of the data, ``Example.facts``, for each of whose values the summary has
            figures of its own. Records hold the values, as ``groups``.

    Returns:
        The summary over ``results.jsonl``. It is also in ``out/summary.json``, and a table of the
        images in ``out/results.csv``.

    Raises:
        DataError: no image has a column of ``group_by``, or it has very many values.
        RunError: ``out`` holds another run or a damaged one, or cannot be written.
        DiveFastError: an unknown strategy, preset or number of probes.
    """
    columns = expect_columns(data, group_by)
    chosen = resolve_strategy(strategy, preset, {})
    probe_list = classifier.probe_list(chosen, probes, seed, timesteps)
    head = as_head(head, chosen, classifier.model)
    # A strategy may refuse the probes when it starts: before the run directory is made.
    next(chosen.search(Task(classifier.model.vocabulary, probe_list, seed, head=head)), None)
    asked = {"strategy": chosen, "probes": probes, "seed": seed, "timesteps": timesteps}
    asked["head"] = head
    config = {**classifier.identity(**asked), "data": data.identity()}
    if columns:
        config["group_by"] = list(columns)
    out, data, part, facts = as_shard(out, data, data.ids, shard)
    config.update(part)
    facts.update(names=classifier.names, data=data.where)
    sources = (
        Source(e.id, partial(_latent, classifier, e), facts_of(e, columns), name=e.id)
        for e in data.examples
    )
    labels = data.labels
    truths = None if labels is None else dict(zip(data.ids, labels.tolist(), strict=True))
    form = Form("classification", classifier.names, truths)

    def stream(latents: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, Any]]:
        return classifier.stream(latents=latents, **asked)

    with RunDirectory.open(out, config, environment(classifier), form, facts) as run:
        run_over(sources, stream, run, progress=progress, total=len(data.examples))
        ids = set(data.ids) if truths is None else truths
        return write_outputs(run.path, ids=ids, fill_rate=classifier.last_run.fill_rate)


def _latent(classifier: DiffusionClassifier, example: Example) -> torch.Tensor:
    return classifier.encode([example.load()])[0]
