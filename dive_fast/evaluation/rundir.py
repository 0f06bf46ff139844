"""A run directory: ``run.json`` says what is run, ``results.jsonl`` holds one line per record.

Results are only ever appended. A run that was killed is opened again and goes on where it
stopped: a torn last line is dropped, everything before it is kept. docs/records.md says what a
record holds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from dive_fast.core.files import leftovers
from dive_fast.errors import RunError, shown
from dive_fast.evaluation.recordindex import RecordIndex
from dive_fast.evaluation.records import Form
from dive_fast.evaluation.runfiles import (
    RESULTS,
    RUN,
    SCHEMA,
    cannot,
    each_result,
    for_json,
    is_record,
    read_results,
    read_run,
    refuse_special,
    write_run,
)
from dive_fast.evaluation.shards import shard_folders

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not locked there
    fcntl = None

log = logging.getLogger(__name__)

_LOCK = ".lock"
# Of an environment: what can change answers. The commit is not among them: a checkout may hold
# changes without one, and a package may lie in somebody else's.
VERSIONS = ("dive_fast", "torch", "diffusers", "transformers", "pillow")
_KEYS = ("config", "environment", "records", "resumed")  # of run.json, which no fact may take


class RunDirectory:
    """One run's directory, open for appending; use ``RunDirectory.open`` in a ``with`` block.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path, lock: BinaryIO | None, form: Form | None = None) -> None:
        self.path = path
        self._lock = lock
        self._form = form
        self._file: BinaryIO | None = None
        self._end = 0  # bytes of results.jsonl that hold whole records
        self._done = RecordIndex(path / RESULTS)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: Mapping,
        environment: Mapping | None = None,
        form: Form | None = None,
        facts: Mapping | None = None,
        beside_shards: bool = False,
    ) -> RunDirectory:
        """Create a run, or resume one of the same configuration.

        A run that was begun with other versions is gone on with, and warned of.

        Args:
            path: the directory; created with its parents if missing.
            config: what decides the results, for JSON; compared when the run is resumed. It is
                stored with ``"schema"``, the number of the records' form.
            environment: versions, platform, commit and the like, for JSON; stored when the run is
                created, and again when it is resumed in another one.
            form: what the records must be, those in the directory and those appended; if None
                they need an ``id`` and nothing more.
            facts: what else ``run.json`` shall say, for JSON: such as the classes' names and where
                the data lie. They are not compared; those of the last opening are kept.
            beside_shards: begin the run where the runs of shards lie, which it shall hold.

        Raises:
            RunError: the directory holds a run of another configuration, of another schema, of
                records of another form or something else, is being written by another process, is
                damaged, or cannot be written.
        """
        path = _as_path(path)
        config, environment = for_json(config), for_json(environment or {})
        facts = for_json({k: v for k, v in (facts or {}).items() if k not in _KEYS})
        if not (isinstance(config, dict) and isinstance(environment, dict)):
            raise RunError(f"{path}: expected config and environment as dictionaries, got others.")
        config = {"schema": SCHEMA, **config}
        run = cls(path, _lock_directory(path, beside_shards), form)
        try:
            if os.path.lexists(path / RUN):
                content = read_run(path)
                _compare(path, content, config, form)
                run._open_results()
                _resume(path, content, environment, facts)
            else:
                kind = {} if form is None else {"records": form.kind}
                write_run(path, {"config": config, "environment": environment, **kind, **facts})
                run._open_results()
        except OSError as error:
            run.close()
            raise cannot("written", path, error) from error
        except BaseException:
            run.close()
            raise
        return run

    def done(self) -> Mapping[str, dict]:
        """The records so far by id, a read-only view that grows with ``append``.

        A record is read from the file when it is asked for: memory holds no more than the ids. Of
        records with the same id the first one without an "error" counts, else the last.
        """
        return self._done

    def finished(self, record_id: str) -> bool:
        """Whether there is a record of that id without an "error", which may be mended."""
        return self._done.finished(record_id)

    def append(self, record: Mapping) -> None:
        """Write one record as one line; it is with the operating system when this returns.

        Non-finite numbers are written as null; numpy and torch values as numbers or lists.

        Args:
            record: for JSON, with a string ``"id"`` that was not recorded before but with an
                ``"error"``; the same error again is not written twice.

        Raises:
            RunError: the record is not of the run's form, or cannot be written. Whatever was
                written of it is cut off again, so the file stays valid.
        """
        record = for_json(record)
        if not is_record(record):
            raise RunError(
                f"{self.path}: expected a record with a string 'id', got {shown(record)}."
            )
        if self._form is not None and (wrong := self._form.wrong(record)) is not None:
            raise RunError(f"{self.path}: the record {shown(record['id'])}: {wrong}.")
        if self.finished(record["id"]):
            raise RunError(f"{self.path}: the record {record['id']!r} is already there.")
        if self._file is None:
            raise RunError(f"{self.path}: the run directory is closed.")
        if record["id"] in self._done and self._done[record["id"]] == record:
            return
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            _write_all(self._file, line)
        except BaseException as error:  # an interrupt, too, may leave half a line
            self._cut_torn_line()
            if isinstance(error, OSError):
                raise cannot("written", self.path / RESULTS, error) from error
            raise
        self._done.add(record, self._end)
        self._end += len(line)

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
                raise cannot("written", self.path / RESULTS, error) from error
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
        path = self.path / RESULTS
        refuse_special(path)
        # Unbuffered, so that a record is written or refused when append returns.
        self._file = open(path, "a+b", buffering=0)
        for start, end, record in each_result(path, self._form):
            self._done.add(record, start)
            self._end = end
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

    Of records with the same id the first one without an "error" counts, else the last. What the
    run says that its records are, they must be; where it says nothing, as of older runs, what
    their fields say.

    Raises:
        RunError: there is no run, its records have another schema, or it is damaged.
    """
    path = _as_path(path)
    try:
        kind = read_run(path).get("records")
        return read_results(path / RESULTS, Form(kind))
    except OSError as error:
        raise cannot("read", Path(error.filename or path), error) from error


def _as_path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise RunError(f"expected a run directory, got {shown(path)}.")
    return Path(path)


def _lock_directory(path: Path, beside_shards: bool) -> BinaryIO | None:
    """Create the directory, or see that it is one of ours, and lock it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_content(path, beside_shards)
        return _acquire_lock(path)
    except RunError:
        raise
    except FileExistsError as error:
        raise RunError(f"{path}: expected a directory, got a file.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise cannot("opened", path, error) from error


def _refuse_foreign_content(path: Path, beside_shards: bool) -> None:
    names = {entry.name for entry in path.iterdir()}
    if RUN in names:
        return
    shards = {path.name for path in shard_folders(path)}
    foreign = sorted(names - {_LOCK} - shards - {left.name for left in leftovers(path / RUN)})
    if foreign:
        raise RunError(
            f"{path}: expected an empty directory or one with a {RUN}, got one with "
            f"{foreign[0]!r}; choose another --out."
        )
    if shards and not beside_shards:
        raise RunError(
            f"{path} holds {len(shards)} runs of shards: 'dive-fast merge {path}' makes one run of "
            "them, or choose another --out."
        )


def _acquire_lock(path: Path) -> BinaryIO | None:
    """An exclusive lock that the operating system releases even if the process is killed."""
    if fcntl is None:
        return None
    refuse_special(path / _LOCK)
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


def _compare(path: Path, content: dict, config: dict, form: Form | None) -> None:
    difference = first_difference(content["config"], config)
    kind = content.get("records")
    if difference is None and form is not None and kind not in (None, form.kind):
        difference = f"its records are of a {kind} there and of a {form.kind} here"
    if difference:
        raise RunError(
            f"{path} holds a run of another configuration: {difference}; choose another --out."
        )


def _resume(path: Path, content: dict, here: dict, facts: dict) -> None:
    """Warns of other versions than before, and adds what is new to ``run.json``."""
    begun, resumed = content.get("environment"), content.get("resumed")
    resumed = resumed if isinstance(resumed, list) else []
    before = [past for past in (begun, *resumed) if isinstance(past, dict)]
    for past in before:
        if there := [name for name in VERSIONS if _differs(past.get(name), here.get(name))]:
            verb = "begun" if past is begun else "gone on"
            log.warning(
                f"{path} was {verb} with {_listed(there, past)} and is gone on with "
                f"{_listed(there, here)}: answers may differ."
            )
            break
    new = {**content, **facts}
    # The same one again adds nothing.
    if here and (not before or before[-1] != here):
        new["resumed"] = [*resumed, here]
    if new != content:
        write_run(path, new)


def _differs(there: object, here: object) -> bool:
    """Whether both are versions, and not the same one."""
    return isinstance(there, str) and isinstance(here, str) and there != here


def _listed(names: list[str], versions: dict) -> str:
    return " and ".join(f"{name} {shown(versions[name])[1:-1]}" for name in names)


def first_difference(there: object, here: object, key: str = "") -> str | None:
    """The first key, in dots, whose values differ, with both values; None if there is none."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        # 1 == True in Python, but not as a setting.
        same = there == here and isinstance(there, bool) == isinstance(here, bool)
        return None if same else f"{key} is {shown(there)} there and {shown(here)} here"
    for name in [*here, *(name for name in there if name not in here)]:
        inner = f"{key}.{name}" if key else name
        if name not in there:
            return f"{inner} is not set there and {shown(here[name])} here"
        if name not in here:
            return f"{inner} is {shown(there[name])} there and not set here"
        if difference := first_difference(there[name], here[name], inner):
            return difference
    return None


def _write_all(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # an unbuffered write may be short
        rest = rest[file.write(rest) :]
