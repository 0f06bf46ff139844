"""One question to a model, and how its answer comes about."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dive_fast.app.shelf import Entry
from dive_fast.app.watch import ClassWatch, LayoutWatch, Stopped, Watch, Watched
from dive_fast.app.where import MapSearch, first_probes, measured
from dive_fast.core.requests import Answer
from dive_fast.data.images import center_crop, read_image, to_mode
from dive_fast.errors import DiveFastError
from dive_fast.models.files.reading import first_line
from dive_fast.predict.classification import Classification, log_odds_bound, log_posterior
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.predict.detections import Detections
from dive_fast.predict.detector import LayoutDetector
from dive_fast.predict.explaining import runner_up
from dive_fast.predict.explanation import Explanation
from dive_fast.strategies import resolve_strategy
from dive_fast.strategies.layout import ANY, Items, LayoutAnswer

log = logging.getLogger(__name__)

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
        where: whether a classifier shall also map where its answer is better than the next class.
    """

    path: str
    strategy: str
    settings: dict[str, Any] = field(default_factory=dict)
    probes: int | None = None
    seed: int = 0
    where: bool = False


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
        where: the map, or a sentence while or because there is none; None where none was asked for.
    """

    found: Classification | Detections | Boxes | None
    evaluations: int
    seconds: float
    state: str
    image: Image.Image
    where: Explanation | str | None = None


def watch_for(entry: Entry) -> Watch:
    """What a search of this model is watched with."""
    return LayoutWatch() if entry.detects else ClassWatch()


def ask(entry: Entry, question: Question, watch: Watch) -> Iterator[Look]:
    """Searches in a thread of its own, and looks at it until it is done or stopped.

    A map is measured after the search, whose answer is there by then and is kept whatever becomes
    of the map. Closing the iterator stops both, and waits until they have.

    Raises:
        DiveFastError: the picture cannot be read, or a setting is refused.
    """
    predictor = entry.ready()
    image = to_mode(read_image(question.path), 3)
    if entry.detects:
        chosen = predictor.layout_strategy(question.strategy, question.settings)
    else:
        chosen = resolve_strategy(question.strategy, None, question.settings)
    # Where the probes lie is the strategy's to say, which the watched one only stands for.
    # Of a list that is given, beta is that of uniform weights.
    probes = predictor.probe_list(chosen, question.probes, question.seed, weights="uniform")
    watched = Watched(chosen, watch, predictor.batch_size)
    given = {"probes": probes, "seed": question.seed}
    mapping = _Mapping(predictor, watched, given) if question.where and not entry.detects else None

    def work() -> Iterator[Any]:
        if entry.detects:
            yield predictor(image, strategy=watched, **given)[0]
            return
        x0 = predictor.encode(question.path)
        (found,) = predictor(latents=x0, strategy=watched, **given)
        yield found
        if mapping is not None:
            yield mapping.of(found, x0, image)

    start, outcome = time.monotonic(), queue.SimpleQueue()
    thread = threading.Thread(target=_into, args=(outcome, work), daemon=True)
    thread.start()
    try:
        while (found := _next(outcome)) is None:
            yield _look(predictor, watch, image, time.monotonic() - start, "running")
        seconds = time.monotonic() - start
        if isinstance(found, Stopped):
            yield _look(predictor, watch, image, seconds, "stopped")
            return
        if isinstance(found, BaseException):
            raise found
        look = Look(found, found.evaluations, seconds, "done", image)
        if mapping is not None:
            yield replace(look, where=mapping.progress())
            while (where := _next(outcome)) is None:
                yield replace(look, where=mapping.progress())
            look = replace(look, where=where if isinstance(where, Explanation) else _reason(where))
        yield look
    finally:
        watch.stop()
        thread.join()


class _Mapping:
    """The map that follows a search.

    Args:
        classifier: that is asked.
        watched: its search.
        given: what both are given, the probes among it.
    """

    def __init__(
        self, classifier: DiffusionClassifier, watched: Watched, given: dict[str, Any]
    ) -> None:
        self.classifier, self.watched, self.given = classifier, watched, given
        self.n_probes = len(first_probes(given["probes"]))
        self.search: MapSearch | None = None  # under way

    def of(self, found: Classification, x0: torch.Tensor, image: Image.Image) -> Explanation:
        """Of a picture x0 [1, C, h, w] and the answer for it; errors as of ``where.measured``."""
        watched, model = self.watched, self.classifier.model
        other = runner_up(found, model.vocabulary)
        self.search = MapSearch(found.index, other, watched.loss, watched.watch, watched.rows)
        channels, side, _ = model.image_shape
        seen = center_crop(to_mode(image, channels), side)
        return measured(self.classifier, x0, self.search, self.given, seen)

    def progress(self) -> str:
        total = 2 * self.n_probes * self.classifier.model.vocabulary.parts
        so_far = 0 if self.search is None else self.search.evaluations
        return f"Looking where: {so_far:,} of {total:,} evaluations."


def _reason(error: BaseException) -> str:
    """Why there is no map."""
    return "No map: stopped." if isinstance(error, Stopped) else f"No map: {sentence(error)}"


def sentence(error: BaseException, picture: str | None = None) -> str:
    """What went wrong, in one sentence; pictures are called as the user calls them."""
    if isinstance(error, DiveFastError):
        text = str(error)
        return text.replace(picture, Path(picture).name) if picture else text
    log.warning("the page: %s: %s", type(error).__name__, first_line(error))
    return f"the model failed ({type(error).__name__}): {first_line(error)}"


def _into(outcome: queue.SimpleQueue, work: Callable[[], Iterator[Any]]) -> None:
    """All that the work yields, and at last its error, if there is one."""
    try:
        with torch.inference_mode(False):
            for found in work():
                outcome.put(found)
    except BaseException as error:
        outcome.put(error)


def _next(outcome: queue.SimpleQueue) -> Any:
    """What comes next, None if it takes longer than a look."""
    try:
        return outcome.get(timeout=LOOK_EVERY)
    except queue.Empty:
        return None


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
