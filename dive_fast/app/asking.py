"""One question to a model, and how its answer comes about."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from dive_fast.app.shelf import Entry
from dive_fast.app.watch import ClassWatch, LayoutWatch, Stopped, Watch, Watched
from dive_fast.core.requests import Answer
from dive_fast.data.images import read_image, to_mode
from dive_fast.predict.classification import Classification, log_odds_bound, log_posterior
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.predict.detections import Detections
from dive_fast.predict.detector import LayoutDetector
from dive_fast.strategies import resolve_strategy
from dive_fast.strategies.layout import ANY, Items, LayoutAnswer, resolve_layout_strategy

LOOK_EVERY = 0.3  # seconds


@dataclass(frozen=True)
class Question:
    """What is asked of one picture.

    Attributes:
        path: of the picture.
        strategy: by name.
        settings: of the strategy.
        probes: how many; the strategy's choice if None.
        seed: of noise and draws.
    """

    path: str
    strategy: str
    settings: dict[str, Any] = field(default_factory=dict)
    probes: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Boxes:
    """Objects of a search that is under way.

    Attributes:
        xyxy: float32 [n, 4], pixels of the image.
        class_id: of each; -1 where it is not known yet.
    """

    xyxy: torch.Tensor
    class_id: tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """How a search stands.

    Attributes:
        found: what it answers, or what it would if it ended now; None where nothing is known yet.
        evaluations: so far.
        seconds: since the question.
        state: "running", "stopped" or "done".
        image: the picture as it was read; upright.
    """

    found: Classification | Detections | Boxes | None
    evaluations: int
    seconds: float
    state: str
    image: Image.Image


def watch_for(entry: Entry) -> Watch:
    """What a search of this model is watched with."""
    return LayoutWatch() if entry.detects else ClassWatch()


def ask(entry: Entry, question: Question, watch: Watch) -> Iterator[Look]:
    """Searches in a thread of its own, and looks at it until it is done or stopped.

    Closing the iterator stops the search, and waits until it has.

    Raises:
        DiveFastError: the picture cannot be read, or a setting is refused.
    """
    predictor = entry.ready()
    image = to_mode(read_image(question.path), 3)
    if entry.detects:
        chosen = resolve_layout_strategy(question.strategy, question.settings)
    else:
        chosen = resolve_strategy(question.strategy, None, question.settings)
    # Where the probes lie is the strategy's to say, which the watched one only stands for.
    probes = predictor.probe_list(chosen, question.probes, question.seed)
    watched = Watched(chosen, watch, predictor.batch_size)

    def search() -> Classification | Detections:
        with torch.inference_mode(False):
            given = {"strategy": watched, "probes": probes, "seed": question.seed}
            return predictor(image if entry.detects else question.path, **given)[0]

    start, outcome = time.monotonic(), queue.SimpleQueue()
    thread = threading.Thread(target=_into, args=(outcome, search), daemon=True)
    thread.start()
    try:
        while True:
            try:
                found = outcome.get(timeout=LOOK_EVERY)
            except queue.Empty:
                yield _look(predictor, watch, image, time.monotonic() - start, "running")
                continue
            break
        seconds = time.monotonic() - start
        if isinstance(found, Stopped):
            yield _look(predictor, watch, image, seconds, "stopped")
        elif isinstance(found, BaseException):
            raise found
        else:
            yield Look(found, found.evaluations, seconds, "done", image)
    finally:
        watch.stop()
        thread.join()


def _into(outcome: queue.SimpleQueue, search: Any) -> None:
    try:
        outcome.put(search())
    except BaseException as error:
        outcome.put(error)


def _look(
    predictor: DiffusionClassifier | LayoutDetector,
    watch: Watch,
    image: Image.Image,
    seconds: float,
    state: str,
) -> Look:
    found: Classification | Boxes | None = None
    if isinstance(watch, LayoutWatch):
        if watch.items is not None:
            found = _boxes(predictor, watch.items, image.size)
    elif (answer := watch.answer()) is not None:
        found = _classification(predictor, answer, watch.evaluations, seconds)
    return Look(found, watch.evaluations, seconds, state, image)


def _boxes(detector: LayoutDetector, items: Items, size: tuple[int, int]) -> Boxes:
    answer = LayoutAnswer(items, torch.empty(0), math.nan)
    classes = (-1 if item.class_id == ANY else item.class_id for item in items)
    return Boxes(detector.boxes(answer, size), tuple(classes))


def _classification(
    classifier: DiffusionClassifier, answer: Answer, evaluations: int, seconds: float
) -> Classification | None:
    """What the losses so far say; None where one of them is no number."""
    beta = classifier.model.inverse_temperature
    posterior = log_posterior(answer, beta)
    if posterior.isnan().any():
        return None
    return Classification(
        label=classifier.names[answer.index],
        index=answer.index,
        log_posterior=posterior,
        losses=answer.losses,
        n_probes=answer.n_probes,
        eliminated=torch.zeros(len(classifier.names), dtype=torch.bool),
        log_odds_bound=log_odds_bound(answer, answer.index, beta),
        names=classifier.names,
        evaluations=evaluations,
        seconds=seconds,
    )
