"""Accuracy of a classifier on labelled images, written as it comes and resumed where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from dive_fast.core.head import Head
from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.data import DataSet, Example
from dive_fast.data.reading import Pixels, as_readers, images_ahead, load
from dive_fast.evaluation.encoding import images_at_once
from dive_fast.evaluation.grouping import expect_columns, facts_of
from dive_fast.evaluation.logs import logged
from dive_fast.evaluation.machine import environment
from dive_fast.evaluation.on_ray import RayOptions, Work, run_on_ray, spread
from dive_fast.evaluation.outputs import write_outputs
from dive_fast.evaluation.records import Form
from dive_fast.evaluation.run import Source, run_over
from dive_fast.evaluation.rundir import RunDirectory
from dive_fast.evaluation.shards import Shard, as_shard
from dive_fast.evaluation.summary import Summary
from dive_fast.logs import LogTo, check_log_to
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
    weights: str | LossWeights | None = None,
    head: Head | str | Path | None = None,
    log_to: LogTo | None = None,
    progress: bool = False,
    shard: Shard | str | None = None,
    group_by: Sequence[str] = (),
    ray: RayOptions | None = None,
    readers: int | None = 0,
) -> Summary:
    """Classifies every image of ``data`` and appends one line each to ``out/results.jsonl``.

    ``out/run.json`` is written first. Run again with the same configuration it resumes: images that
    have a line are not computed again. An image that cannot be read is recorded with its error, and
    the rest go on.

    Args:
        log_to: where running figures go beside the records: "tensorboard", "wandb" or "trackio",
            with a directory or project behind a colon if wanted, or an object with the methods of
            ``logs.Logger``.
        shard: only every N-th image: a ``Shard`` or its text, such as "3/16", or "auto" in a
            process of torchrun or srun. The run then lies in a folder of ``out`` of its own, and
            ``merging.merge`` makes one run of all.
        readers: processes that read images ahead; 0 reads them here, None begins here and starts
            some where that pays. A script that asks for them needs its ``if __name__ ==
            "__main__":``, for they import it.
        group_by: columns of the data, ``Example.facts``, for each of whose values the summary has
            figures of its own. Records hold the values, as ``groups``.
        ray: have the workers of a Ray cluster compute, see ``RayOptions``; ``classifier`` is then
            what theirs are compared with, and need not lie on a GPU.

    Returns:
        The summary over ``results.jsonl``. It is also in ``out/summary.json``, and a table of the
        images in ``out/results.csv``.

    Raises:
        DataError: no image has a column of ``group_by``, or it has very many values.
        RunError: ``out`` holds another run or a damaged one, or cannot be written; or the logger
            cannot be opened.
        DiveFastError: an unknown strategy, preset or number of probes; ``log_to`` is no logger, or
            its package is not installed; or as ``run_on_ray``.
    """
    check_log_to(log_to)
    columns = expect_columns(data, group_by)
    readers = as_readers(readers, on_ray=ray is not None)
    chosen = resolve_strategy(strategy, preset, {})
    probe_list = classifier.probe_list(chosen, probes, seed, timesteps, weights)
    head = as_head(head, chosen, classifier.model)
    # A strategy may refuse the probes when it starts: before the run directory is made.
    next(chosen.search(Task(classifier.model.vocabulary, probe_list, seed, head=head)), None)
    asked = {"strategy": chosen, "probes": probes, "seed": seed, "timesteps": timesteps}
    asked |= {"weights": weights, "head": head}
    config = {**classifier.identity(**asked), "data": data.identity()}
    if columns:
        config["group_by"] = list(columns)
    out, data, part, facts = as_shard(out, data, data.ids, shard)
    config.update(part)
    facts.update(names=classifier.names, data=data.where)
    labels = data.labels
    truths = None if labels is None else dict(zip(data.ids, labels.tolist(), strict=True))
    form = Form("classification", classifier.names, truths)

    source, stream = partial(source_of, columns), partial(_stream, asked)
    here = environment(classifier) if ray is None else spread(environment(classifier), ray)
    with (
        RunDirectory.open(out, config, here, form, facts) as run,
        logged(run, log_to, config) as records,
    ):
        if ray is None:
            channels, size, _ = classifier.model.image_shape
            run_over(
                sources_of(source, classifier, data),
                partial(stream, classifier),
                records,
                progress=progress,
                total=len(data.examples),
                readers=readers,
                shared=indexed(data),
                ahead=images_ahead(channels * size * size),
                encode=classifier.encode_pixels,
                at_once=images_at_once(classifier.model.device),
            )
            fill_rate = classifier.last_run.fill_rate
        else:
            work = Work(
                data.examples,
                data.ids,
                source,
                stream,
                identity=partial(_identity, asked),
                encode=attrgetter("encode_pixels"),
            )
            fill_rate = run_on_ray(work, classifier, records, ray, progress=progress)
        ids = set(data.ids) if truths is None else truths
        summary = write_outputs(run.path, ids=ids, fill_rate=fill_rate)
        records.finish(summary.to_dict())
        return summary


def indexed(data: DataSet) -> tuple[Sequence[Example], ...]:
    """The examples, for readers to know them all; none of a stream, which bring their images."""
    return (data.examples,) if isinstance(data.examples, Sequence) else ()


def sources_of(
    source: Callable[..., Source], classifier: DiffusionClassifier, data: DataSet
) -> Iterator[Source]:
    """Of all examples, such that readers are sent the examples once and then only positions."""
    known = indexed(data)
    for i, example in enumerate(data.examples):
        yield source(classifier, example, partial(load, *known, i) if known else None)


def source_of(
    columns: Sequence[str],
    classifier: DiffusionClassifier,
    example: Example,
    read: Callable[[], Any] | None = None,
) -> Source:
    """Whose image is read as pixels, wherever that is, and encoded afterwards.

    Args:
        read: gives the image; ``example.load`` if None.
    """
    channels, size, _ = classifier.model.image_shape
    pixels = Pixels(example.load if read is None else read, size, channels)
    return Source(example.id, pixels, facts_of(example, columns), name=example.id)


def _stream(
    asked: Mapping[str, Any],
    classifier: DiffusionClassifier,
    latents: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, Any]]:
    return classifier.stream(latents=latents, **asked)


def _identity(asked: Mapping[str, Any], classifier: DiffusionClassifier) -> dict[str, Any]:
    return classifier.identity(**asked)
