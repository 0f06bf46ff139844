"""The figures of a run while its records come: running means, from the records alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dive_fast.evaluation.rundir import RunDirectory
from dive_fast.logs import Logger, LogTo, logging_to

LOG_EVERY = 10  # records


class Running:
    """Means over the records so far; it holds sums, and the ids of what failed."""

    def __init__(self) -> None:
        self._answered = 0
        self._sums: Counter[str] = Counter()
        self._failed: set[str] = set()

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes one more; an answer takes the place of the error of the same id."""
        if "error" in record:
            self._failed.add(record["id"])
            return
        self._failed.discard(record["id"])
        self._answered += 1
        self._sums.update(_figures(record))

    @property
    def step(self) -> int:
        """How many images have a record."""
        return self._answered + len(self._failed)

    def figures(self) -> dict[str, float]:
        """By the names that they have in a summary."""
        means = {name: total / self._answered for name, total in self._sums.items()}
        return {**means, "failed": len(self._failed)}


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    """What of one answer can be summed."""
    figures = {
        f"{name}_per_image": float(record[name])
        for name in ("evaluations", "seconds")
        if name in record
    }
    if "truth" in record:
        figures["accuracy"] = float(record["index"] == record["truth"])
    if "boxes" in record:
        figures["objects_per_image"] = float(len(record["boxes"]))
    return figures


class LoggedRecords:
    """A run directory's records, whose figures are logged while they are appended."""

    def __init__(self, run: RunDirectory, logger: Logger) -> None:
        self._run, self._logger = run, logger
        self._running = Running()
        for record in run.done().values():
            self._running.add(record)
        self._logged = self._running.step

    def finished(self, record_id: str) -> bool:
        return self._run.finished(record_id)

    def append(self, record: Mapping[str, Any]) -> None:
        self._run.append(record)
        self._running.add(record)
        if self._running.step >= self._logged + LOG_EVERY:
            self._log()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Logs what is not logged yet, and the final figures."""
        if self._running.step > self._logged:
            self._log()
        self._logger.finish(summary)

    def _log(self) -> None:
        self._logged = self._running.step
        self._logger.log(self._logged, self._running.figures())


class _Unlogged:
    """A run directory's records, and nothing else."""

    def __init__(self, run: RunDirectory) -> None:
        self.finished, self.append = run.finished, run.append

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass


@contextlib.contextmanager
def logged(
    run: RunDirectory, log_to: LogTo | None, config: Mapping[str, Any]
) -> Iterator[LoggedRecords | _Unlogged]:
    """The records of an open run, to append to: where ``log_to`` is not None they are logged.

    Call ``finish`` with the summary at the end; a run that ends without counts as cut off.

    Args:
        config: what the run is about, for JSON.

    Raises:
        DiveFastError: ``log_to`` is no logger, or needs a package that is not installed.
        RunError: it cannot be opened.
    """
    if log_to is None:
        yield _Unlogged(run)
        return
    with logging_to(log_to, run.path, config, len(run.done())) as logger:
        yield LoggedRecords(run, logger)
