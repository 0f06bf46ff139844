"""The two files of a run directory, read and written: ``run.json`` and ``results.jsonl``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dive_fast.core.files import leftovers, replacing
from dive_fast.core.numbers import is_whole
from dive_fast.errors import RunError, shown
from dive_fast.evaluation.records import Form

# Of the records' form. Another number, and no run of the old form is gone on with or misread.
SCHEMA = 1

RUN, RESULTS = "run.json", "results.jsonl"

_KINDS = ("classification", "detection", "choice", "task")


def is_finished(records: Mapping[str, Mapping], record_id: str) -> bool:
    """Whether there is a record of that id without an "error"."""
    return record_id in records and "error" not in records[record_id]


# -- run.json --------------------------------------------------------------------------------------


def read_run(directory: Path) -> dict:
    """What ``run.json`` holds: a ``config`` of this schema, the rest as it is.

    Raises:
        RunError: the file is damaged, of another schema, or cannot be read.
    """
    path = directory / RUN
    refuse_special(path)
    try:
        content = for_json(json.loads(path.read_bytes().decode("utf-8-sig")))
    except OSError as error:
        raise cannot("read", path, error) from error
    except (ValueError, RecursionError):
        content = None
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        raise RunError(
            f"{path}: expected a JSON object with a 'config', got a damaged file; choose another "
            "--out."
        )
    schema, kind = config.get("schema"), content.get("records")
    if not is_whole(schema) or schema != SCHEMA:
        raise RunError(
            f"{directory}: expected a run with records of schema {SCHEMA}, got schema "
            f"{shown(schema)}; compute it anew in another directory."
        )
    if kind is not None and kind not in _KINDS:
        raise RunError(
            f"{path}: expected 'records' to be {' or '.join(_KINDS)}, got {shown(kind)}; choose "
            "another --out."
        )
    return content


def is_detection_run(directory: Path) -> bool:
    """Whether its records are of a detector; raises as ``read_run``."""
    return read_run(directory).get("records") == "detection"


def write_run(directory: Path, content: Mapping) -> None:
    """Writes ``run.json`` whole or not at all; the directory is locked.

    Raises:
        OSError: it cannot be written.
    """
    path = directory / RUN
    for left in leftovers(path):  # their writers were killed
        left.unlink()
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


# -- results.jsonl ---------------------------------------------------------------------------------


def each_result(
    path: Path, form: Form | None, without: Sequence[str] = ()
) -> Iterator[tuple[int, int, dict]]:
    """Each whole record of the file, one at a time: (first byte, byte behind it, record).

    Args:
        path: of the file.
        form: what the records must be.
        without: lists of numbers that are left out, unread, by the names of their fields.

    Raises:
        RunError: it is no regular file, a line is damaged, or a record is not of the form.
        OSError: it cannot be read.
    """
    refuse_special(path)
    end = 0
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            read = _without(line, without) if without else line
            record = parse_result(read, "utf-8-sig" if number == 1 else "utf-8")
            if record is None:
                if end + len(line) == size:
                    return  # torn: the process died while it was written
                raise RunError(
                    f"{path}: expected one JSON record with an 'id' per line, got a damaged line "
                    f"{number}."
                )
            if form is not None and (wrong := form.wrong(record)) is not None:
                raise RunError(f"{path}: line {number}: {wrong}.")
            yield end, end + len(line), record
            end += len(line)


def _without(line: bytes, names: Sequence[str]) -> bytes:
    """A record's line without its lists of these names.

    In a text a quotation mark has a backslash before it, so none is taken for a field's name.
    """
    for name in names:
        field = f'"{name}": ['.encode()
        start = line.find(field)
        first, end = start + len(field), line.find(b"], ", start)
        # What is no list of numbers stays, to be refused or read as what it is.
        if 0 <= start < end and line.find(b'"', first, end) < 0 > line.find(b"[", first, end):
            line = line[:start] + line[end + 3 :]
    return line


def read_results(path: Path, form: Form | None) -> dict[str, dict]:
    """Records by id; raises as ``each_result``."""
    done: dict[str, dict] = {}
    for _, _, record in each_result(path, form):
        if not is_finished(done, record["id"]):
            done[record["id"]] = record
    return done


def is_record(value: object) -> bool:
    """Whether it is an object with a string ``id``."""
    return isinstance(value, dict) and isinstance(value.get("id"), str)


def parse_result(line: bytes, encoding: str = "utf-8-sig") -> dict | None:
    """The record of one whole line; None where it is none."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line.decode(encoding))
    except (ValueError, RecursionError):
        return None
    return record if is_record(record) else None


# -- both ------------------------------------------------------------------------------------------


def refuse_special(path: Path) -> None:
    """Directories and devices; and pipes, which would be waited for."""
    if path.exists() and not path.is_file():
        raise RunError(f"{path}: expected a regular file, got something else.")


def for_json(value: object) -> object:
    """Strict JSON's types: non-finite floats become null, tuples and arrays lists."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return for_json(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise RunError(f"expected values for JSON, got {type(value).__name__}.")


def cannot(done: str, path: Path, error: Exception) -> RunError:
    """The sentence of what the operating system refused."""
    reason = getattr(error, "strerror", None) or str(error)
    return RunError(f"{path}: cannot be {done} ({reason}).")
