"""The part of a report on runs of detectors: the COCO numbers, and images with their boxes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from dive_fast.core.numbers import is_number
from dive_fast.data.images import read_image
from dive_fast.errors import DiveFastError
from dive_fast.evaluation.coco_scores import NAMES
from dive_fast.evaluation.detection import summarise_detections
from dive_fast.predict.detections import Detections
from dive_fast.report.headline import counted, named
from dive_fast.report.parts import (
    NOTHING,
    Cell,
    Column,
    Gallery,
    Headed,
    Picture,
    Section,
    Table,
    Text,
    Tiles,
    best_of,
    number,
)
from dive_fast.report.runs import Run
from dive_fast.report.sources import Annotated
from dive_fast.report.thumbnails import thumbnail

SIDE = 384  # pixels
_SUMMARY = "summary.json"


def detector_sections(
    runs: Sequence[Run], pictures: Sequence[Annotated], n: int
) -> tuple[list[Section], list[str]]:
    """The sections, and what could not be shown, in sentences."""
    scores, problems = [], [p.problem for p in pictures if p.problem]
    for run, of in zip(runs, pictures, strict=True):
        found, problem = _scores(run, of)
        scores.append(found)
        problems += [problem] if problem else []
    sections = [_headline(runs, scores), _classes(runs, scores), _images(runs, pictures, n)]
    return [section for section in sections if section is not None], problems


# -- numbers ---------------------------------------------------------------------------------------


def _scores(run: Run, pictures: Annotated) -> tuple[Mapping[str, Any], str]:
    """The summary's numbers: as the run tells them, else computed from the annotations."""
    path = run.path / _SUMMARY
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        told = None
    answered = sum("error" not in record for record in run.records.values())
    if isinstance(told, dict) and told.get("n") == answered and "AP" in told:
        return told, ""
    if pictures.dataset is None:
        return {}, f"{run.label}: the COCO numbers need its annotations: --data FILE.json."
    try:
        return summarise_detections(run.records, pictures.dataset, _names(run)).to_dict(), ""
    except DiveFastError as error:
        return {}, f"{run.label}: no COCO numbers: {error}"


def _headline(runs: Sequence[Run], scores: Sequence[Mapping[str, Any]]) -> Section:
    parts: list[object] = []
    if len(runs) == 1:
        parts.append(_tiles(runs[0], scores[0]))
    columns = [Column("Run", numeric=False)]
    names = [*NAMES, "AP_one_class"]
    columns += [Column(name.replace("_", " ")) for name in names]
    columns += [
        Column("Objects per image", meaning="detections, whatever their confidence"),
        Column("Evaluations per image"),
        Column("Seconds per image"),
        Column("Images", meaning="searched; failed ones could not be read"),
    ]
    best = {name: best_of([_number(s.get(name)) for s in scores], True) for name in names}
    rows = []
    for i, (run, found) in enumerate(zip(runs, scores, strict=True)):
        good = [r for r in run.records.values() if "error" not in r]
        n, failed = len(good), len(run.records) - len(good)
        objects = sum(len(r["boxes"]) for r in good) / n
        evaluations = sum(r["evaluations"] for r in good) / n
        seconds = sum(r["seconds"] for r in good) / n
        numbers = [_number(found.get(name)) for name in names]
        rows.append(
            [
                named(run),
                *(
                    Cell(number(v), v, best=best[name][i])
                    for name, v in zip(names, numbers, strict=True)
                ),
                Cell(number(objects, 2), objects),
                Cell(number(evaluations, 0), evaluations),
                Cell(number(seconds, 3), seconds),
                counted(n, failed),
            ]
        )
    table = Table("The detectors side by side", columns, rows, sortable=len(runs) > 1)
    return Section("detection", "Boxes: the COCO numbers", [*parts, table])


def _tiles(run: Run, found: Mapping[str, Any]) -> Tiles:
    good = [r for r in run.records.values() if "error" not in r]
    evaluations = sum(r["evaluations"] for r in good) / len(good)
    failed = len(run.records) - len(good)
    return Tiles(
        [
            ("AP", number(_number(found.get("AP"))), "mean over IoU 0.50 to 0.95"),
            ("AP50", number(_number(found.get("AP50"))), ""),
            ("evaluations per image", number(evaluations, 0), ""),
            ("images", f"{len(good):,}", f"{failed:,} failed" if failed else "none failed"),
        ]
    )


def _classes(runs: Sequence[Run], scores: Sequence[Mapping[str, Any]]) -> Section | None:
    of_runs = [s.get("AP_per_class") for s in scores]
    of_runs = [of if isinstance(of, Mapping) else {} for of in of_runs]
    names = dict.fromkeys(name for of in of_runs for name in of)
    if not names:
        return None
    columns = [Column("Class", numeric=False)]
    single = len(runs) == 1
    columns += [Column("AP" if single else run.label, series=run.series) for run in runs]
    rows = []
    for name in names:
        values = [_number(of.get(name)) for of in of_runs]
        bars = [
            Cell(number(v), v, bar=v, series=run.series)
            for v, run in zip(values, runs, strict=True)
        ]
        rows.append([Cell(name), *bars])
    table = Table("AP of each class", columns, rows)
    return Section("detection-classes", "Boxes: class by class", [table])


def _number(value: object) -> float | None:
    return float(value) if is_number(value) else None


# -- images ----------------------------------------------------------------------------------------


def _images(runs: Sequence[Run], pictures: Sequence[Annotated], n: int) -> Section | None:
    parts: list[object] = []
    for run, of in zip(runs, pictures, strict=True):
        chosen = spread(run.records, n)
        gallery = Gallery([_picture(run, of, key) for key in chosen], wide=True)
        if len(runs) > 1:
            parts.append(Headed(run.label, [gallery], series=run.series))
        else:
            parts.append(gallery)
    if n == 0:
        return None
    text = "From the image whose least certain object is the least certain to the surest one."
    return Section("boxes", "Boxes: images", [Text(text), *parts])


def spread(records: Mapping[str, Mapping[str, Any]], n: int) -> list[str]:
    """Ids of ``n`` images, evenly from the order of their least certain object."""
    good = [key for key, record in records.items() if "error" not in record]
    good.sort(key=lambda key: min(records[key]["confidences"], default=1.0))
    if len(good) <= n or n < 2:
        return good[:n]
    return [good[round(i * (len(good) - 1) / (n - 1))] for i in range(n)]


def _picture(run: Run, pictures: Annotated, key: str) -> Picture:
    record = run.records[key]
    sure = zip(record["labels"], record["confidences"], strict=True)
    said = ", ".join(f"{label} {confidence:.2f}" for label, confidence in sure) or "nothing"
    facts = [f"found: {said}"]
    if (known := pictures.annotation(key)) is not None:
        names = pictures.dataset.names
        there = Counter(names[c] for c in known.class_ids.tolist())
        listed = ", ".join(name if m == 1 else f"{m} x {name}" for name, m in there.items())
        facts.append(f"annotated: {listed or 'nothing'}")
    facts.append(f"{record['evaluations']:,} evaluations")
    alt = f"Image {key} with boxes around what was found: {said}"
    uri, size, pixelated, missing = "", (SIDE, SIDE), False, ""
    try:
        uri, size, pixelated = thumbnail(_drawn(run, pictures, key), SIDE)
    except DiveFastError as error:
        missing = f"No picture: {error}" if pictures.found else ""
    return Picture(key, uri, size, alt, facts, pixelated=pixelated, missing=missing)


def _drawn(run: Run, pictures: Annotated, key: str) -> Image.Image:
    """The image with its boxes; that of ``dive-fast detect`` is drawn already."""
    record = run.records[key]
    path = (run.path / record.get("drawn", ".")).resolve()
    if path.is_file() and path.is_relative_to(run.path.resolve()):
        return read_image(path)
    names = _names(run)
    probabilities = record.get("class_probabilities")
    found = Detections(
        record["boxes"], record["indices"], record["confidences"], names, probabilities
    )
    return found.draw(pictures.read(key))


def _names(run: Run) -> tuple[str, ...]:
    """The detector's classes, as its configuration or its records tell them."""
    told = run.config.get("names") or run.content.get("names")
    if isinstance(told, list) and all(isinstance(name, str) for name in told):
        return tuple(told)
    seen = {
        row: label
        for record in run.records.values()
        if "error" not in record
        for row, label in zip(record["indices"], record["labels"], strict=True)
    }
    return tuple(seen.get(row, NOTHING) for row in range(max(seen, default=-1) + 1))
