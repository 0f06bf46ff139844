"""The part of a report on runs of classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from dive_fast.evaluation.metrics import figures
from dive_fast.report import classes, curves, examples, headline
from dive_fast.report.parts import Section
from dive_fast.report.runs import Run
from dive_fast.report.sources import Pictures


def sections(runs: Sequence[Run], pictures: Sequence[Pictures], n: int) -> list[Section]:
    """All sections, the headline first.

    Args:
        runs: of classifiers.
        pictures: of each; none for a report without images.
        n: how many of the worst and of the closest images are shown.
    """
    found = [figures(run.table) for run in runs]
    made = [
        headline.section(runs, found),
        curves.cost_section(runs),
        curves.confidence_section(runs),
        classes.confusion_section(runs),
        classes.class_section(runs),
        classes.group_section(runs),
        examples.image_section(runs, pictures, n) if n else None,
    ]
    return [section for section in made if section is not None]
