"""A classifier's run as columns: what figures, reports and comparisons are made of."""

from __future__ import annotations

import math
import os
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dive_fast.errors import RunError, shown
from dive_fast.evaluation.records import NOT_IN_FIGURES, Form, check_figures
from dive_fast.evaluation.runfiles import RESULTS, cannot, each_result, read_run

TOP = 5
_OTHERS = {"detection": "a detector", "choice": "'choose'", "task": "a task"}


@dataclass(frozen=True, eq=False)
class RunTable:
    """One row for every image that was answered, in the order of the answers.

    Attributes:
        ids: of the images.
        truth, index: int32 [n], rows of the right class and of the answer.
        probability: float32 [n], p(y | x0) of the answer.
        truth_probability: float32 [n], p(y | x0) of the right class; 0 where it was not measured.
        truth_log_probability: float64 [n], log p(y | x0) of it, in nats, also where p is 0 in
            float32; -inf where it was not measured.
        truth_rank: int32 [n], 1 where no class is more probable than the right one; the number of
            classes where it was not measured.
        top: int32 [n, 5], the most probable classes, the answer first; -1 where there are fewer.
        top_scores: float32 [n, 5], their p(y | x0); 0 where there are fewer.
        evaluations: int64 [n], forwards plus backwards of the network.
        seconds: float64 [n], of wall time.
        groups: for each column of ``--group-by`` the value of every row.
        failed: the images that could not be read, with why.
        n_classes: how many the model has.
        names: of the classes; of runs that do not tell them those that their answers name, and
            the number of any other.
        config, environment: of ``run.json``.
        data: where the images lay, if the run tells.
    """

    ids: list[str]
    truth: np.ndarray
    index: np.ndarray
    probability: np.ndarray
    truth_probability: np.ndarray
    truth_log_probability: np.ndarray
    truth_rank: np.ndarray
    top: np.ndarray
    top_scores: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray
    groups: dict[str, list[str]]
    failed: dict[str, str]
    n_classes: int
    names: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Any = None
    path: Path | None = None
    _posteriors: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def correct(self) -> np.ndarray:
        """bool [n], whether the answer is right."""
        return self.index == self.truth

    @contextmanager
    def posteriors(self) -> Iterator[np.ndarray | None]:
        """p(y | x0) of every row and class, float32 [n, C]; 0 where it was not measured.

        It lies in a temporary file, of which memory holds what is looked at. None where the records
        do not tell it, or there are none.
        """
        if self._posteriors is None or not len(self):
            yield None
            return
        shape = (len(self), self.n_classes)
        table = np.memmap(self._posteriors, np.float32, "r", shape=shape)
        try:
            yield table
        finally:
            del table

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunTable:
        """The table of a run directory, finished or not.

        Raises:
            RunError: there is no run, it is one of a detector, its records tell no right class, or
                it is damaged.
        """
        if not isinstance(path, str | os.PathLike):
            raise RunError(f"expected a run directory, got {shown(path)}.")
        path = Path(path)
        content = read_run(path)
        kind = content.get("records")
        if kind in _OTHERS:
            raise RunError(f"{path}: expected a run of a classifier, got one of {_OTHERS[kind]}.")
        columns = _Columns()
        try:
            form = Form(kind, whole=False)
            for _, _, record in each_result(path / RESULTS, form, NOT_IN_FIGURES):
                columns.add(record)
        except OSError as error:
            raise cannot("read", Path(error.filename or path), error) from error
        return columns.table(content, path)


def table_of(records: Sequence[Mapping[str, Any]]) -> RunTable:
    """The table of records in memory, as ``read_records`` gives their values."""
    columns = _Columns()
    for record in records:
        columns.add(record)
    return columns.table({}, None)


class _Columns:
    """Grows by one record after the other; memory holds some twenty numbers of each."""

    def __init__(self) -> None:
        self.rows: dict[str, None] = {}
        self.failed: dict[str, str] = {}
        self.truth, self.index, self.rank = array("i"), array("i"), array("i")
        self.probability, self.of_truth = array("f"), array("f")
        self.log_of_truth = array("d")
        self.top, self.top_scores = array("i"), array("f")
        self.evaluations, self.seconds = array("q"), array("d")
        self.groups: dict[str, list[str]] = {}
        self.seen: dict[int, str] = {}  # names of classes, as answers tell them
        self.n_classes = 0
        self.posteriors = tempfile.TemporaryFile(prefix="posteriors-")

    def add(self, record: Mapping[str, Any]) -> None:
        """Of records with the same id the first one without an "error" counts, else the last.

        Raises:
            RunError: the record lacks what the figures are made of.
        """
        check_figures(record)
        key = record.get("id", f"record {len(self.rows) + len(self.failed)}")
        if key in self.rows:
            return
        if "error" in record:
            self.failed[key] = record["error"]
            return
        self.failed.pop(key, None)
        self.rows[key] = None
        self._numbers(record)
        self._groups(record.get("groups") or {})

    def _numbers(self, record: Mapping[str, Any]) -> None:
        truth, index = record["truth"], record["index"]
        told = record.get("log_posterior", ())
        if self.n_classes and told and len(told) != self.n_classes:
            raise RunError(
                f"the record {shown(record.get('id'))}: expected 'log_posterior' of "
                f"{self.n_classes} classes as before, got {len(told)}."
            )
        log_posterior = np.array([-math.inf if x is None else x for x in told], np.float64)
        posterior = np.exp(log_posterior).astype(np.float32)
        self.n_classes = max(self.n_classes, len(posterior), truth + 1, index + 1)
        self.posteriors.write(posterior.tobytes())
        self.truth.append(truth)
        self.index.append(index)
        self.probability.append(record["probability"])
        right = posterior[truth] if truth < len(posterior) else 0.0
        self.of_truth.append(record["probability"] if truth == index else right)
        self.log_of_truth.append(_log_of_truth(record, log_posterior))
        self.rank.append(_rank(log_posterior, truth, index))
        top = record.get("top") or [{"index": index, "score": record["probability"]}]
        for entry in [*top[:TOP], *([{}] * (TOP - len(top)))]:
            self.top.append(entry.get("index", -1))
            self.top_scores.append(entry.get("score", 0.0))
            if "label" in entry:
                self.seen[entry["index"]] = entry["label"]
        self.evaluations.append(record["evaluations"])
        self.seconds.append(record["seconds"])

    def _groups(self, groups: Mapping[str, Any]) -> None:
        n = len(self.rows)
        for column, value in groups.items():
            values = self.groups.setdefault(column, [""] * (n - 1))
            values.append(str(value))
        for values in self.groups.values():
            values.extend([""] * (n - len(values)))

    def table(self, content: Mapping[str, Any], path: Path | None) -> RunTable:
        n = len(self.rows)
        names = content.get("names")
        if not (isinstance(names, list) and len(names) == self.n_classes):
            names = [self.seen.get(row, str(row)) for row in range(self.n_classes)]
        self.posteriors.flush()
        whole = os.fstat(self.posteriors.fileno()).st_size == 4 * n * self.n_classes
        return RunTable(
            ids=list(self.rows),
            truth=np.asarray(self.truth),
            index=np.asarray(self.index),
            probability=np.asarray(self.probability),
            truth_probability=np.asarray(self.of_truth),
            truth_log_probability=np.asarray(self.log_of_truth),
            truth_rank=np.asarray(self.rank),
            top=np.asarray(self.top).reshape(n, TOP),
            top_scores=np.asarray(self.top_scores).reshape(n, TOP),
            evaluations=np.asarray(self.evaluations),
            seconds=np.asarray(self.seconds),
            groups=self.groups,
            failed=self.failed,
            n_classes=len(names),
            names=tuple(map(str, names)),
            config=content.get("config") or {},
            environment=content.get("environment") or {},
            data=content.get("data"),
            path=path,
            _posteriors=self.posteriors if whole else None,
        )


def _log_of_truth(record: Mapping[str, Any], log_posterior: np.ndarray) -> float:
    truth, p = record["truth"], record["probability"]
    if truth < len(log_posterior):
        return float(log_posterior[truth])
    return math.log(p) if truth == record["index"] and p > 0 else -math.inf


def _rank(log_posterior: np.ndarray, truth: int, index: int) -> int:
    """1 for the answer; else one more than the classes that are more probable, the answer first."""
    if truth == index:
        return 1
    if truth >= len(log_posterior) or log_posterior[truth] == -math.inf:
        return max(len(log_posterior), truth + 1)
    better = log_posterior > log_posterior[truth]
    better[index] = True
    return 1 + int(better.sum())
