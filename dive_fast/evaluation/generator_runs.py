"""One generator over labelled images, for a comparison: a run directory as ``evaluate`` writes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.data import DataSet
from dive_fast.data.reading import images_ahead
from dive_fast.evaluation.classification import indexed, source_of, sources_of
from dive_fast.evaluation.encoding import images_at_once
from dive_fast.evaluation.machine import environment
from dive_fast.evaluation.outputs import write_outputs
from dive_fast.evaluation.records import Form
from dive_fast.evaluation.run import Source, run_over
from dive_fast.evaluation.rundir import RunDirectory
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.predict.measuring import Item, Measured, bound_in_nats, measure


@dataclass(frozen=True)
class Settings:
    """How generators are measured.

    Attributes:
        probes: of every class.
        likelihood_probes: of the right class; None measures no likelihood.
        classes_per_image: how many, the right one among them; None takes all.
        seed: of noises and of the classes that are tried.
    """

    probes: int
    likelihood_probes: int | None
    classes_per_image: int | None
    seed: int


def run_generator(
    classifier: DiffusionClassifier,
    data: DataSet,
    out: Path,
    settings: Settings,
    *,
    has_bound: bool,
    readers: int | None,
    progress: bool,
) -> None:
    """Measures every image of ``data`` that has no record in ``out`` yet.

    Args:
        has_bound: whether its likelihood can be measured.

    Raises:
        RunError: ``out`` holds another run or a damaged one, or cannot be written.
    """
    model = classifier.model
    shape, n_timesteps = tuple(model.latent_shape), len(model.schedule)
    # The fractions and the noises do not depend on T.
    probes = low_discrepancy_probes(settings.probes, n_timesteps, shape, settings.seed)
    bound = None
    if has_bound and settings.likelihood_probes is not None:
        bound = bound_in_nats(classifier, settings.likelihood_probes, settings.seed)
    labels = data.labels
    truths = None if labels is None else dict(zip(data.ids, labels.tolist(), strict=True))
    form = Form("classification", classifier.names, truths)
    facts = {"names": classifier.names, "data": data.where}
    config = _config(classifier, data, settings, bound is not None)
    of_images: dict[str, int] = {}  # the right classes of those on their way

    def sources() -> Iterator[Source]:
        for source in sources_of(partial(source_of, ()), classifier, data):
            of_images[source.id] = source.facts["truth"]
            yield source

    def stream(latents: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, Measured]]:
        def items() -> Iterator[Item]:
            for key, x0 in latents:
                truth = of_images.pop(key)
                rows = tried_classes(truth, len(classifier.names), key, settings)
                yield Item(key, x0, rows, truth)

        return measure(classifier, items(), probes, bound)

    channels, size, _ = model.image_shape
    with RunDirectory.open(out, config, environment(classifier), form, facts) as run:
        run_over(
            sources(),
            stream,
            run,
            progress=progress,
            total=len(data.examples),
            readers=readers,
            shared=indexed(data),
            ahead=images_ahead(channels * size * size),
            encode=classifier.encode_pixels,
            at_once=images_at_once(model.device),
        )
        ids = set(data.ids) if truths is None else truths
        write_outputs(run.path, ids=ids, fill_rate=classifier.last_run.fill_rate)


def tried_classes(truth: int, n_classes: int, key: str, settings: Settings) -> torch.Tensor:
    """The rows that an image is tried on: all, or the right one and random others, int64 [m].

    They depend on the image's id and the seed alone, so they are the same for all generators.
    """
    few = settings.classes_per_image
    if few is None or few >= n_classes:
        return torch.arange(n_classes)
    own = zlib.crc32(key.encode("utf-8", "surrogatepass"))
    others = np.random.default_rng([settings.seed, own]).permutation(n_classes - 1)[: few - 1]
    others += others >= truth
    return torch.from_numpy(np.append(others, truth)).long()


def _config(
    classifier: DiffusionClassifier, data: DataSet, settings: Settings, has_bound: bool
) -> dict[str, Any]:
    asked = {"probes": settings.probes, "seed": settings.seed}
    plain = {"timesteps": "uniform", "weights": "uniform"}
    found = classifier.identity(strategy="enumerate", **asked, **plain)
    found["comparison"] = {
        "classes_per_image": settings.classes_per_image,
        "likelihood_probes": settings.likelihood_probes if has_bound else None,
    }
    return {**found, "data": data.identity()}
