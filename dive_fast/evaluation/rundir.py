"""A run directory: ``run.json`` says what is run, ``results.jsonl`` holds one line per record.

Results are only ever appended. A run that was killed is opened again and goes on where it
stopped: a torn last line is dropped, everything before it is kept. docs/records.md says what a
record holds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO

from dive_fast.core.files import leftovers, replacing
from dive_fast.errors import RunError

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not locked there
    fcntl = None

# Of the records' form. Another number, and no run of the old form is gone on with or misread.
SCHEMA = 1

_RUN, _RESULTS, _LOCK = "run.json", "results.jsonl", ".lock"


def is_finished(records: Mapping[str, Mapping], record_id: str) -> bool:
    """Whether there is a record of that id without an "error"."""
    return record_id in records and "error" not in records[record_id]


class RunDirectory:
    """One run's directory, open for appending; use ``RunDirectory.open`` in a ``with`` block.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path, lock: BinaryIO | None) -> None:
        self.path = path
        self._lock = lock
        self._file: BinaryIO | None = None
        self._end = 0  # bytes of results.jsonl that hold whole records
        self._done: dict[str, dict] = {}

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], config: Mapping, environment: Mapping | None = None
    ) -> RunDirectory:
        """Create a run, or resume one of the same configuration.

        Args:
            path: the directory; created with its parents if missing.
            config: what decides the results, for JSON; compared when the run is resumed. It is
                stored with ``"schema"``, the number of the records' form.
            environment: versions, platform, commit and the like, for JSON; stored when the run is
                created, never compared.

        Raises:
            RunError: the directory holds a run of another configuration, of another schema or
                something else, is being written by another process, is damaged, or cannot be
                written.
        """
        path = Path(path)
        config, environment = _for_json(config), _for_json(environment or {})
        config = {"schema": SCHEMA, **config}
        run = cls(path, _lock_directory(path))
        try:
            if (path / _RUN).exists():
                _compare(path, _read_config(path / _RUN), config)
            else:
                _write_config(path / _RUN, {"config": config, "environment": environment})
            run._open_results()
        except OSError as error:
            run.close()
            raise _cannot("written", path, error) from error
        except BaseException:
            run.close()
            raise
        return run

    def done(self) -> Mapping[str, dict]:
        """The records so far by id, a read-only view that grows with ``append``.

        Of records with the same id the first one without an "error" counts, else the last.
        """
        return MappingProxyType(self._done)

    def finished(self, record_id: str) -> bool:
        """Whether there is a record of that id without an "error", which may be mended."""
        return is_finished(self._done, record_id)

    def append(self, record: Mapping) -> None:
        """Write one record as one line; it is with the operating system when this returns.

        Non-finite numbers are written as null; numpy and torch values as numbers or lists.

        Args:
            record: for JSON, with a string ``"id"`` that was not recorded before but with an
                ``"error"``; the same error again is not written twice.

        Raises:
            RunError: the record cannot be written. Whatever was written of it is cut off again,
                so the file stays valid.
        """
        record = _for_json(record)
        if not _is_record(record):
            raise RunError(f"{self.path}: expected a record with a string 'id', got {record!r}.")
        if self.finished(record["id"]):
            raise RunError(f"{self.path}: the record {record['id']!r} is already there.")
        if self._file is None:
            raise RunError(f"{self.path}: the run directory is closed.")
        if self._done.get(record["id"]) == record:
            return
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            _write_all(self._file, line)
        except BaseException as error:  # an interrupt, too, may leave half a line
            self._cut_torn_line()
            if isinstance(error, OSError):
                raise _cannot("written", self.path / _RESULTS, error) from error
            raise
        self._end += len(line)
        self._done[record["id"]] = record

    def close(self) -> None:
        """Bring the results to the disk and release the lock; a second call does nothing.

        Raises:
            RunError: the disk refused what it had accepted before.
        """
        file, self._file = self._file, None
        lock, self._lock = self._lock, None
        try:
            if file is not None:
                with file:
                    os.fsync(file.fileno())
        except OSError as error:
            # Some file systems have no fsync: that is not a failed write.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise _cannot("written", self.path / _RESULTS, error) from error
        finally:
            if lock is not None:
                lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_results(self) -> None:
        path = self.path / _RESULTS
        if path.exists() and not path.is_file():
            raise RunError(f"{path}: expected a regular file, got something else.")
        # Unbuffered, so that a record is written or refused when append returns.
        self._file = open(path, "a+b", buffering=0)
        self._done, self._end = _read_results(path)
        self._file.truncate(self._end)

    def _cut_torn_line(self) -> None:
        try:
            self._file.truncate(self._end)
        except OSError:
            # Another line after the torn one would hide it: let nothing more be appended. The
            # next opening drops it.
            with contextlib.suppress(RunError):
                self.close()


def read_records(path: str | os.PathLike[str]) -> dict[str, dict]:
    """The records of a run directory by id; a torn last line is left out.

    Of records with the same id the first one without an "error" counts, else the last.

    Raises:
        RunError: there is no run, its records have another schema, or it is damaged.
    """
    path = Path(path)
    try:
        _check_schema(path, _read_config(path / _RUN))
        return _read_results(path / _RESULTS)[0]
    except OSError as error:
        raise _cannot("read", Path(error.filename or path), error) from error


def _lock_directory(path: Path) -> BinaryIO | None:
    """Create the directory, or see that it is one of ours, and lock it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_content(path)
        return _acquire_lock(path)
    except RunError:
        raise
    except FileExistsError as error:
        raise RunError(f"{path}: expected a directory, got a file.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _cannot("opened", path, error) from error


def _refuse_foreign_content(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    foreign = sorted(names - {_LOCK} - {left.name for left in leftovers(path / _RUN)})
    if foreign and _RUN not in names:
        raise RunError(
            f"{path}: expected an empty directory or one with a {_RUN}, got one with "
            f"{foreign[0]!r}; choose another --out."
        )


def _acquire_lock(path: Path) -> BinaryIO | None:
    """An exclusive lock that the operating system releases even if the process is killed."""
    if fcntl is None:
        return None
    lock = open(path / _LOCK, "ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise RunError(f"{path}: another process is writing this run.") from error
    except OSError:  # a network file system without locks: go on without
        lock.close()
        return None
    return lock


def _read_config(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError):
        content = None
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        raise RunError(
            f"{path}: expected a JSON object with a 'config', got a damaged file; choose another "
            "--out."
        )
    return config


def _check_schema(path: Path, config: dict) -> None:
    if (there := config.get("schema")) != SCHEMA:
        raise RunError(
            f"{path}: expected a run with records of schema {SCHEMA}, got schema {there}; compute "
            "it anew in another directory."
        )


def _compare(path: Path, there: dict, here: dict) -> None:
    _check_schema(path, there)
    difference = _first_difference(there, here, "")
    if difference:
        raise RunError(
            f"{path} holds a run of another configuration: {difference}; choose another --out."
        )


def _first_difference(there: object, here: object, key: str) -> str | None:
    """The first key, in dots, whose values differ, with both values; None if there is none."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        # 1 == True in Python, but not as a setting.
        same = there == here and isinstance(there, bool) == isinstance(here, bool)
        return None if same else f"{key} is {there!r} there and {here!r} here"
    for name in [*here, *(name for name in there if name not in here)]:
        inner = f"{key}.{name}" if key else name
        if name not in there:
            return f"{inner} is not set there and {here[name]!r} here"
        if name not in here:
            return f"{inner} is {there[name]!r} there and not set here"
        if difference := _first_difference(there[name], here[name], inner):
            return difference
    return None


def _write_config(path: Path, content: dict) -> None:
    for left in leftovers(path):  # the directory is locked: their writers were killed
        left.unlink()
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


def _read_results(path: Path) -> tuple[dict[str, dict], int]:
    """Records by id, and the number of bytes up to the end of the last whole one."""
    done: dict[str, dict] = {}
    end = 0
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            record = _parse(line)
            if record is None:
                if end + len(line) == size:
                    break  # torn: the process died while it was written
                raise RunError(
                    f"{path}: expected one JSON record with an 'id' per line, got a damaged line "
                    f"{number}."
                )
            if not is_finished(done, record["id"]):
                done[record["id"]] = record
            end += len(line)
    return done, end


def _parse(line: bytes) -> dict | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("id"), str)


def _write_all(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # an unbuffered write may be short
        rest = rest[file.write(rest) :]


def _for_json(value: object) -> object:
    """Strict JSON's types: non-finite floats become null, tuples and arrays lists."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return _for_json(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise RunError(f"expected values for JSON, got {type(value).__name__}.")


def _cannot(done: str, path: Path, error: Exception) -> RunError:
    reason = getattr(error, "strerror", None) or str(error)
    return RunError(f"{path}: cannot be {done} ({reason}).")
