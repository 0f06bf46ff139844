"""COCO scores of a detector, written image by image and resumed where it stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from dive_fast.data.coco import (
    CocoDataset,
    CocoImage,
    class_categories,
    expect_fitting_images,
    mirrored_images,
    unknown_classes,
)
from dive_fast.data.reading import as_readers, read_rgb
from dive_fast.evaluation.coco_scores import NAMES, BoxScores, pycocotools, score_boxes
from dive_fast.evaluation.logs import logged
from dive_fast.evaluation.machine import machine
from dive_fast.evaluation.on_ray import RayOptions, Work, run_on_ray, spread
from dive_fast.evaluation.outputs import write_detection_outputs
from dive_fast.evaluation.records import Form, check_detection
from dive_fast.evaluation.run import Source, run_over
from dive_fast.evaluation.rundir import RunDirectory
from dive_fast.evaluation.shards import Shard, as_shard
from dive_fast.logs import LogTo, check_log_to
from dive_fast.predict.detections import Detections

log = logging.getLogger(__name__)


class Detector(Protocol):
    """What ``evaluate_detections`` needs of a detector."""

    @property
    def names(self) -> Sequence[str]:
        """The classes' names."""
        ...

    def stream(
        self, images: Iterable[tuple[str, Image.Image]], **search: Any
    ) -> Iterator[tuple[str, Detections]]:
        """Reads images when it has room for them, yields answers as they are ready.

        Args:
            images: (key, RGB image), each key once.
            search: what ``evaluate_detections`` was given beside its own arguments.

        Yields:
            (key, detections in pixels of that image), in any order.
        """
        ...


@dataclass(frozen=True)
class DetectionSummary:
    """What an evaluation found; ``None`` stands for figures that no image supports.

    Attributes:
        scores: the twelve COCO numbers by name, in [0, 1], over the images that were searched;
            each object counts with all classes that it could be, by their probabilities.
        ap_one_class: AP when every object counts with its most probable class only.
        ap_per_class: AP by class name, of ``scores``.
        n: images searched.
        failed: images that could not be read; their boxes do not count.
        objects_per_image: detections, whatever their confidence.
        evaluations_per_image: forwards plus backwards of the network.
        seconds_per_image: of wall time.
    """

    scores: dict[str, float | None]
    ap_one_class: float | None
    ap_per_class: dict[str, float | None]
    n: int
    failed: int
    objects_per_image: float | None
    evaluations_per_image: float | None
    seconds_per_image: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the twelve numbers first."""
        return {
            **self.scores,
            "AP_one_class": self.ap_one_class,
            "AP_per_class": self.ap_per_class,
            "n": self.n,
            "failed": self.failed,
            "objects_per_image": self.objects_per_image,
            "evaluations_per_image": self.evaluations_per_image,
            "seconds_per_image": self.seconds_per_image,
        }


def evaluate_detections(
    detector: Detector,
    dataset: CocoDataset,
    out: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    log_to: LogTo | None = None,
    progress: bool = False,
    readers: int | None = 0,
    shard: Shard | str | None = None,
    ray: RayOptions | None = None,
    **search: Any,
) -> DetectionSummary:
    """Searches every image of ``dataset`` and appends one line each to ``out/results.jsonl``.

    ``out/run.json`` is written first. Run again with the same configuration it resumes: images
    that have a line are not searched again. An image that is missing, cannot be read or has
    another size than annotated is recorded with its error, and the rest go on.

    Args:
        detector: finds the objects.
        dataset: images and annotated boxes. Its classes and the detector's are matched by name.
        out: the run directory.
        config: what decides the detector's answers, for JSON: model, settings, seed; of a
            ``LayoutDetector`` its ``identity`` if None. A run of another configuration is not
            resumed.
        environment: what else is worth recording; other versions are warned of.
        log_to: where running figures go beside the records, as for ``evaluate``.
        progress: show a bar.
        readers: processes that read images ahead, as in ``evaluate``.
        shard: only every N-th image, as ``classification.evaluate`` has it.
        ray: have the workers of a Ray cluster compute, as ``classification.evaluate`` has it.
        **search: for the detector's ``stream``: strategy, probes, seed.

    Raises:
        RunError: ``out`` holds another run or a damaged one, or cannot be written; or the logger
            cannot be opened.
        DataError: the detector knows none of the classes, nothing is annotated, or all images have
            another size than annotated.
        DiveFastError: pycocotools is not installed, or ``log_to`` is no logger or its package is
            not.
    """
    readers = as_readers(readers, on_ray=ray is not None)
    # Hours of search should not end at a missing package or at data that cannot be scored.
    pycocotools()
    check_log_to(log_to)
    dataset.expect_objects("to score")
    unknown = unknown_classes(dataset, detector.names)
    expect_fitting_images(dataset)
    for sentence in (unknown, mirrored_images(dataset)):
        if sentence is not None:
            log.warning(sentence)
    config = detector.identity(**search) if config is None else config
    config = {**config, "data": dataset.identity(), "names": list(detector.names)}
    out, dataset, part, facts = as_shard(out, dataset, [str(i.id) for i in dataset.images], shard)
    config.update(part)
    facts.update(data=dataset.where)
    form = Form("detection", detector.names)
    here = {**machine(), **(environment or {})}
    ids = [str(i.id) for i in dataset.images]
    with (
        RunDirectory.open(out, config, spread(here, ray) if ray else here, form, facts) as run,
        logged(run, log_to, config) as records,
    ):
        if ray is None:
            sources = [_source(detector, image) for image in dataset.images]
            answers = partial(detector.stream, **search)
            run_over(sources, answers, records, progress=progress, readers=readers)
        else:
            identity = partial(_identity, search) if hasattr(detector, "identity") else None
            work = Work(dataset.images, ids, _source, partial(_stream, search), identity)
            run_on_ray(work, detector, records, ray, progress=progress)
        done = run.done()
        summary = summarise_detections(done, dataset, detector.names)
        there = ((key, done[key]) for key in ids if key in done)
        write_detection_outputs(run.path, summary.to_dict(), there)
        records.finish(summary.to_dict())
        return summary


def _source(detector: Detector, image: CocoImage) -> Source:
    # A missing image is among the data's problems already.
    name = None if image.path is None else str(image.path)
    return Source(str(image.id), partial(read_rgb, image), name=name)


def _stream(
    search: Mapping[str, Any], detector: Detector, images: Iterable[tuple[str, Image.Image]]
) -> Iterator[tuple[str, Detections]]:
    return detector.stream(images, **search)


def _identity(search: Mapping[str, Any], detector: Any) -> dict[str, Any]:
    return detector.identity(**search)


def summarise_detections(
    records: Mapping[str, Mapping[str, Any]], dataset: CocoDataset, names: Sequence[str]
) -> DetectionSummary:
    """The figures over records of ``results.jsonl`` (by id, as ``read_records`` gives them).

    Records without ``class_probabilities`` are scored by their class alone.

    Args:
        records: a run's records, also of an unfinished one; images without a record do not count.
        dataset: the annotated boxes.
        names: the detector's classes.

    Raises:
        DataError: the detector knows none of the data set's classes.
        RunError: a record is not of a detection by these classes.
    """
    categories = class_categories(dataset, names)
    there = [(i.id, records[str(i.id)]) for i in dataset.images if str(i.id) in records]
    for _, record in there:
        check_detection(record, names)
    good = [(image_id, record) for image_id, record in there if "error" not in record]
    n, failed = len(good), len(there) - len(good)
    if not good:
        numbers, classes = dict.fromkeys(NAMES), dict.fromkeys(dataset.names)
        return DetectionSummary(numbers, None, classes, 0, failed, None, None, None)
    found = [(image_id, _detections(record, names)) for image_id, record in good]
    image_ids = [image_id for image_id, _ in good]

    def scored(every_class: bool) -> BoxScores:
        results = [
            entry
            for image_id, detections in found
            for entry in detections.to_coco(image_id, categories, every_class=every_class)
        ]
        return score_boxes(dataset, results, image_ids)

    scores = scored(every_class=True)
    return DetectionSummary(
        scores=scores.numbers,
        ap_one_class=scored(every_class=False).numbers["AP"],
        ap_per_class=scores.classes,
        n=n,
        failed=failed,
        objects_per_image=sum(len(record["boxes"]) for _, record in good) / n,
        evaluations_per_image=sum(record["evaluations"] for _, record in good) / n,
        seconds_per_image=sum(record["seconds"] for _, record in good) / n,
    )


def _detections(record: Mapping[str, Any], names: Sequence[str]) -> Detections:
    return Detections(
        record["boxes"],
        record["indices"],
        record["confidences"],
        tuple(names),
        record.get("class_probabilities"),
    )
