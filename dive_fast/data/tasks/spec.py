"""What a task is, as a small file says it: docs/tasks.md explains each key.

``specs/`` holds those that come with the package.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.data.class_trees import read_tree
from dive_fast.errors import DataError, shown

_SPECS = Path(__file__).parent / "specs"
SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class TaskSpec:
    """A task: which files its items come from, and what their fields mean.

    Image i of an item belongs to text i; what either has more of belongs to nothing.

    Attributes:
        name: of the task.
        images: the fields that hold the images' file names. One that holds a list counts for all
            of its values, in their order; so of ``texts``.
        texts: the fields that hold the texts.
        items: files of items; of each the category of its items, or None.
        category: the field that holds an item's category; None where the files say it, or nothing.
        id: the field that tells the items of a file apart; None for their key or row.
        about: one line on it.
        source: where its files come from.
        citation, licence: of its makers.
    """

    name: str
    images: tuple[str, ...]
    texts: tuple[str, ...]
    items: tuple[tuple[str, str | None], ...]
    category: str | None = None
    id: str | None = None
    about: str = ""
    source: str = ""
    citation: str = ""
    licence: str = ""

    @classmethod
    def from_dict(cls, content: Any, where: str) -> TaskSpec:
        """A task of the content of its file.

        Args:
            where: what a sentence calls the file.

        Raises:
            DataError: a key is missing, unknown, or holds what it cannot.
        """
        if not isinstance(content, Mapping):
            raise DataError(f"{where}: expected a task as an object of keys, got {shown(content)}.")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in content if key not in known]:
            raise DataError(
                f"{where}: a task has the keys {', '.join(known)}, got {shown(unknown[0])}."
            )
        for key in ("name", "images", "texts", "items"):
            if key not in content:
                raise DataError(f"{where}: expected a task with {key!r}, got one without.")
        found: dict[str, Any] = {
            "images": _names(content["images"], "images", where),
            "texts": _names(content["texts"], "texts", where),
            "items": _files(content["items"], where),
        }
        for key in known:
            if key not in found and content.get(key) is not None:
                found[key] = _text(content[key], key, where)
        by_file = any(category is not None for _, category in found["items"])
        if by_file and found.get("category") is not None:
            raise DataError(
                f"{where}: expected the category from the files or from a field, got both."
            )
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what decides the items."""
        return {
            "name": self.name,
            "images": list(self.images),
            "texts": list(self.texts),
            "items": [list(item) for item in self.items],
            "category": self.category,
            "id": self.id,
        }

    def to_json(self) -> dict[str, Any]:
        """For JSON: all of it."""
        told = ("about", "source", "citation", "licence")
        return {**self.to_dict(), **{key: getattr(self, key) for key in told}}


def task_names() -> tuple[str, ...]:
    """The tasks that come with the package."""
    return tuple(sorted(path.stem for path in _SPECS.glob("*.json")))


def read_task(task: str | os.PathLike[str]) -> TaskSpec:
    """A task by its name, or by the JSON or YAML file that says what it is.

    Raises:
        DataError: there is none of that name, or the file cannot be read as one.
    """
    if not isinstance(task, str | os.PathLike):
        raise DataError(f"expected the name of a task or a file, got {shown(task)}.")
    text = os.fspath(task)
    if text in task_names():
        path = _SPECS / f"{text}.json"
        return TaskSpec.from_dict(json.loads(path.read_text(encoding="utf-8")), text)
    if not text.lower().endswith(SUFFIXES):
        raise DataError(
            f"expected a task of {', '.join(task_names())}, or a file of one "
            f"({', '.join(SUFFIXES)}), got {text!r}."
        )
    try:
        content = Path(text).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{text}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:  # no UTF-8, or a NUL in the name
        raise DataError(f"{text}: cannot be read as text ({error}).") from error
    kind = "JSON" if text.lower().endswith(".json") else "YAML"
    return TaskSpec.from_dict(read_tree(content, text, kind), text)


def _names(value: Any, key: str, where: str) -> tuple[str, ...]:
    """One field or several, none twice."""
    listed = value if isinstance(value, list) else [value]
    found = tuple(_text(name, key, where) for name in listed)
    if not found or len(set(found)) < len(found):
        raise DataError(f"{where}: expected {key!r} to be different fields, got {shown(value)}.")
    return found


def _files(value: Any, where: str) -> tuple[tuple[str, str | None], ...]:
    if isinstance(value, Mapping) and value:
        return tuple(
            (_text(file, "items", where), _text(category, "items", where))
            for category, file in value.items()
        )
    return tuple((file, None) for file in _names(value, "items", where))


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected {key!r} to be a text, got {shown(value)}.")
    return value
