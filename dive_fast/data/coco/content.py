"""The JSON of an annotation file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dive_fast.data.coco.problems import short
from dive_fast.errors import DataError

LISTS = ("images", "annotations", "categories")
# Keys that decide something: of two with one name, which is meant?
_READ = {
    *LISTS, "id", "file_name", "width", "height", "image_id", "category_id", "bbox", "area",
    "iscrowd", "name", "supercategory",
}  # fmt: skip


def read_content(path: Path) -> dict[str, Any]:
    """The object in an annotation file, with its three lists.

    UTF-8 with or without a byte order mark, UTF-16 and UTF-32 are read.

    Raises:
        DataError: missing, a directory, unreadable, no JSON, no JSON object, one of the lists is
            missing, or a key that is read occurs twice in an object, with different values.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected an annotation file, but nothing is there.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: expected an annotation file, got a directory.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except _RepeatedKey as error:
        raise DataError(f"{path}: expected every key once in an object, got {error}.") from error
    except RecursionError as error:
        raise DataError(f"{path}: expected a JSON file, got one nested too deep.") from error
    except ValueError as error:  # no UTF-8, no JSON, a NUL in the file's name
        raise DataError(f"{path}: expected a JSON file ({_reason(error)}).") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected a COCO annotation file, a JSON object, got a "
            f"{type(content).__name__}."
        )
    for key in LISTS:
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{path}: expected a COCO annotation file with the lists {LISTS[0]}, {LISTS[1]} "
                f"and {LISTS[2]}, got one without {key}."
            )
    return content


class _RepeatedKey(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json itself silently takes the last of several values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if key in _READ and repr(value) != repr(found[key]):
                values = f" ({short(value)} and {short(found[key])})"
                raise _RepeatedKey(f"{key!r} twice{'' if key in LISTS else values}")
    return found


def _reason(error: ValueError) -> str:
    # "; use sys.set_int_max_str_digits()" is no advice for users of a file
    return str(error).partition(";")[0].rstrip(".")
