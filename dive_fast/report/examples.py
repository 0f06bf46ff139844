"""The images of a classifier's run that are worth a look: the worst, the closest, the failed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dive_fast.errors import DiveFastError
from dive_fast.evaluation.table import RunTable
from dive_fast.report.parts import (
    Cell,
    Column,
    Gallery,
    Headed,
    Picture,
    Section,
    Table,
    Text,
    number,
    percent,
)
from dive_fast.report.runs import Run
from dive_fast.report.sources import Pictures
from dive_fast.report.thumbnails import thumbnail

SIDE = 160  # pixels
MOST_ERRORS = 200


def worst(table: RunTable, n: int) -> np.ndarray:
    """Rows of the wrong answers of the highest probability, those first."""
    wrong = np.flatnonzero(~table.correct)
    order = np.argsort(-table.probability[wrong], kind="stable")
    return wrong[order[:n]]


def closest(table: RunTable, n: int) -> np.ndarray:
    """Rows whose two best classes are the least apart, those first; of rows that have two."""
    two = np.flatnonzero(table.top[:, 1] >= 0)
    margin = np.abs(table.top_scores[two, 0] - table.top_scores[two, 1])
    return two[np.argsort(margin, kind="stable")[:n]]


def image_section(runs: Sequence[Run], pictures: Sequence[Pictures], n: int) -> Section:
    """Of each run up to ``n`` of the worst and of the closest images."""
    parts: list[object] = []
    for run, of in zip(runs, pictures, strict=True):
        lists = _lists(run, of, n, level=4 if len(runs) > 1 else 3)
        if len(runs) > 1:
            parts.append(Headed(run.label, lists, series=run.series))
        else:
            parts += lists
    return Section("images", "Images to look at", parts)


def _lists(run: Run, pictures: Pictures, n: int, level: int) -> list[object]:
    table = run.table
    wrong, near = worst(table, n), closest(table, n)
    none_wrong: list[object] = [Text("No answer is wrong.")]
    gallery = [_gallery(run, pictures, wrong)] if len(wrong) else none_wrong
    parts: list[object] = [Headed("Wrong, and sure of it", gallery, level=level)]
    if len(near):
        parts.append(Headed("The closest decisions", [_gallery(run, pictures, near)], level=level))
    return parts


def _gallery(run: Run, pictures: Pictures, rows: np.ndarray) -> Gallery:
    return Gallery([_picture(run.table, pictures, row) for row in rows.tolist()])


def _picture(table: RunTable, pictures: Pictures, row: int) -> Picture:
    key, names = table.ids[row], table.names
    truth, index = int(table.truth[row]), int(table.index[row])
    shown = [(int(i), float(s)) for i, s in zip(table.top[row], table.top_scores[row], strict=True)]
    top = [(names[i], s, i == truth) for i, s in shown if i >= 0]
    facts = [f"{int(table.evaluations[row]):,} evaluations"]
    if not any(right for _, _, right in top):
        p = float(table.truth_probability[row])
        facts.insert(0, f"right: {names[truth]}" + (f", p = {number(p, 4)}" if p else ""))
    answer = f"{names[index]} ({percent(float(table.probability[row]))})"
    if truth == index:
        alt = f"Image {key}, answered {answer}, which is right"
    else:
        alt = f"Image {key} of the class {names[truth]}, answered {answer}"
    uri, size, pixelated, missing = "", (SIDE, SIDE), False, ""
    try:
        uri, size, pixelated = thumbnail(pictures.read(key, truth), SIDE)
    except DiveFastError as error:
        missing = f"No picture: {error}" if pictures.found else ""
    return Picture(key, uri, size, alt, facts, truth == index, top, pixelated, missing)


def error_section(failed: Sequence[tuple[Run, dict[str, str]]]) -> Section | None:
    """The images that could not be read, and why; None where all could."""
    parts: list[object] = []
    for run, errors in failed:
        if not errors:
            continue
        rows = [[Cell(key), Cell(error)] for key, error in list(errors.items())[:MOST_ERRORS]]
        columns = [Column("Image", numeric=False), Column("Error", numeric=False)]
        more = f", the first {MOST_ERRORS}" if len(errors) > MOST_ERRORS else ""
        what = "one image" if len(errors) == 1 else f"{len(errors):,} images"
        caption = f"{run.label}: {what} that could not be read{more}"
        parts.append(Table(caption, columns, rows))
    return Section("errors", "Errors", parts) if parts else None
