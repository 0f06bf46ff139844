"""The runs of a report: read, named and numbered."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.errors import RunError, shown
from dive_fast.evaluation.rundir import read_records
from dive_fast.evaluation.runfiles import read_run
from dive_fast.evaluation.table import RunTable


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory.

    Attributes:
        path: the directory.
        label: its name, with as many of its parents' as tell it from the other runs.
        series: its number in the report, from 0.
        content: of ``run.json``.
        table: of a classifier's run.
        records: of a detector's run, by id.
    """

    path: Path
    label: str
    series: int
    content: Mapping[str, Any]
    table: RunTable | None = None
    records: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.content["config"]

    @property
    def environment(self) -> Mapping[str, Any]:
        return _mapping(self.content.get("environment"))

    @property
    def data(self) -> Mapping[str, Any]:
        """Of the configuration: source, count, fingerprint."""
        return _mapping(self.config.get("data"))

    @property
    def where(self) -> str | None:
        """Where the images lay, or their annotations, if the run tells."""
        found = self.content.get("data")
        found = _mapping(found).get("annotations", found)
        return found if isinstance(found, str) else None

    @property
    def images(self) -> str | None:
        """The folder of annotated images, if the run tells."""
        found = _mapping(self.content.get("data")).get("images")
        return found if isinstance(found, str) else None


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """All runs, in the order given.

    Raises:
        RunError: there is none, one is given twice, is none, is damaged or has no answer.
    """
    if not isinstance(paths, Iterable):
        raise RunError(f"expected run directories, got {shown(paths)}.")
    paths = [_path(path) for path in paths]
    if not paths:
        raise RunError("expected at least one run directory, got none.")
    labels = _labels(paths)
    return [_read(path, labels[i], i) for i, path in enumerate(paths)]


def _read(path: Path, label: str, series: int) -> Run:
    if not path.is_dir():
        raise RunError(f"{path}: expected a run directory, got {_what(path)}.")
    content = read_run(path)
    if content.get("records") == "detection":
        records = read_records(path)
        answered = sum("error" not in record for record in records.values())
        run, failed = Run(path, label, series, content, records=records), len(records) - answered
    else:
        table = RunTable.read(path)
        answered, failed = len(table), len(table.failed)
        run = Run(path, label, series, content, table=table)
    if not answered:
        more = f" ({failed} images failed)" if failed else ""
        raise RunError(f"{path}: expected a run with answers, got one without{more}.")
    return run


def _path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise RunError(f"expected a run directory, got {shown(path)}.")
    return Path(path)


def _what(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    whole = [path.resolve() for path in paths]
    for i, path in enumerate(whole):
        if path in whole[:i]:
            raise RunError(f"{path}: expected each run once, got it twice.")
    most = max(len(path.parts) for path in whole)
    for n in range(1, most + 1):
        labels = ["/".join(path.parts[-n:]) for path in whole]
        if len(set(labels)) == len(labels):
            break
    return labels


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
