"""``write_report``: from run directories to the file."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dive_fast.core.files import replacing
from dive_fast.core.numbers import whole
from dive_fast.errors import DataError, DiveFastError, RunError, shown
from dive_fast.report.runs import Run, read_runs

log = logging.getLogger(__name__)

PICTURES = 24  # of each kind and run
_NEEDED = {"jinja2": "Jinja2", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def write_report(
    runs: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    pictures: int = PICTURES,
) -> list[str]:
    """Writes one HTML file on one or several runs, of classifiers, of detectors, or of both.

    It holds everything that it shows and asks no network for anything. The file is there whole or
    as it was.

    Args:
        runs: run directories, finished or not.
        out: the file, whose name must end with .html or .htm; an old one is replaced.
        data: where the images lie, as ``dive_fast.data.open_dataset`` takes it, or the annotation
            file of detectors; by default where each run says. Without them there are no pictures.
        images: the folder of the images of an annotation file.
        pictures: how many images of each kind are shown of each run.

    Returns:
        What the page does not show, in sentences; they stand on it, too, and are warned of.

    Raises:
        RunError: there is no run, one without answers, one twice, or a damaged one; or ``out``
            cannot be written or is not named as a page.
        DataError: ``data`` were named and cannot be read.
        DiveFastError: a package of the extra ``report`` is not installed.
    """
    _expect_packages()
    pictures = whole("pictures", pictures, 0)
    for name, given in (("data", data), ("images", images)):
        if given is not None and not isinstance(given, str | os.PathLike):
            raise DataError(f"expected {name} as a text or a path, got {shown(given)}.")
    out = _target(out)
    found = read_runs([runs] if isinstance(runs, str | os.PathLike) else runs)
    page, problems = _page(found, data, images, pictures)
    for problem in problems:
        log.warning("%s", problem)
    try:
        with replacing(out) as file:
            file.write(page)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error}).") from error
    return problems


def _page(
    runs: Sequence[Run],
    data: str | os.PathLike[str] | None,
    images: str | os.PathLike[str] | None,
    n: int,
) -> tuple[bytes, list[str]]:
    """The page and its problems."""
    from dive_fast.report import classifiers, configuration, detectors, examples, page
    from dive_fast.report.sources import Sources

    of_classes = [run for run in runs if run.table is not None]
    of_boxes = [run for run in runs if run.records is not None]
    sections, problems = [], []
    with Sources(data, images) as sources:
        if of_classes:
            found = [sources.of_classifier(run) for run in of_classes] if n else []
            sections += classifiers.sections(of_classes, found, n)
            problems += [p.problem for p in found if p.problem]
        if of_boxes:
            annotated = [sources.of_detector(run) for run in of_boxes]
            more, wrong = detectors.detector_sections(of_boxes, annotated, n)
            sections += more
            problems += wrong
    errors = examples.error_section([(run, _errors(run)) for run in runs])
    sections = [sections[0], configuration.section(runs), *sections[1:]]
    sections += [errors] if errors is not None else []
    names = [run.label for run in runs]
    title = names[0] if len(names) == 1 else f"{len(names)} runs compared"
    subtitle = "" if len(names) == 1 else ", ".join(names)
    return page.render(title, subtitle, problems, sections), problems


def _errors(run: Run) -> dict[str, str]:
    if run.table is not None:
        return run.table.failed
    return {key: r["error"] for key, r in run.records.items() if "error" in r}


def _expect_packages() -> None:
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DiveFastError(
            f"a report needs {' and '.join(missing)}: pip install 'dive_fast[report]'."
        )


def _target(out: object) -> Path:
    """Where the page goes; refused now what would be refused after the work."""
    if not isinstance(out, str | os.PathLike):
        raise RunError(f"expected a file to write, got {shown(out)}.")
    path = Path(out)
    if path.is_dir():
        raise RunError(f"{path}: expected a file to write, got a directory.")
    if path.suffix.lower() not in (".html", ".htm"):  # a slip must not replace results
        raise RunError(f"{path}: expected a name that ends with .html, got another.")
    if path.exists() and not path.is_file():
        raise RunError(f"{path}: expected a regular file, got something else.")
    if not path.parent.is_dir():
        raise RunError(f"{path}: expected a directory to write into, got none at {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise RunError(f"{path}: cannot be written (no permission in {path.parent}).")
    return path
