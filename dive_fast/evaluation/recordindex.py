"""Which records a run has, and where each begins in its file: all that memory holds of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dive_fast.errors import RunError
from dive_fast.evaluation.runfiles import cannot, parse_result


class RecordIndex(Mapping[str, dict]):
    """Records by id, each read from the file when it is asked for.

    Of records with the same id the first one without an "error" counts, else the last.

    Args:
        path: of ``results.jsonl``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start: dict[str, int] = {}  # the byte where it begins; ~byte of one with an "error"

    def add(self, record: Mapping, start: int) -> None:
        """Takes note of a record that lies at the byte ``start``."""
        key = record["id"]
        if not self.finished(key):
            self._start[key] = ~start if "error" in record else start

    def finished(self, key: str) -> bool:
        """Whether there is a record of that id without an "error"."""
        return self._start.get(key, -1) >= 0

    def __getitem__(self, key: str) -> dict:
        start = self._start[key]
        try:
            with open(self._path, "rb") as file:
                file.seek(start if start >= 0 else ~start)
                record = parse_result(file.readline())
        except OSError as error:
            raise cannot("read", self._path, error) from error
        if record is None or record["id"] != key:
            raise RunError(f"{self._path}: the record {key!r} is no longer where it was written.")
        return record

    def __contains__(self, key: object) -> bool:
        return key in self._start

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)
