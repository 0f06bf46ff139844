"""The items of a task, read from its files: JSON, JSON lines, YAML, CSV or TSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dive_fast.data.class_trees import read_tree
from dive_fast.data.tasks.spec import TaskSpec, read_task
from dive_fast.data.tasks.store import Store, identity
from dive_fast.errors import DataError, shown

_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_TREES = {".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}


@dataclass(frozen=True)
class TaskItem:
    """Images and texts of which image i belongs to text i.

    Attributes:
        id: each once in a task.
        images: what the images are called.
        texts: each once, none empty.
        category: of the item; None where the task has no categories.
    """

    id: str
    images: tuple[str, ...]
    texts: tuple[str, ...]
    category: str | None = None


@dataclass(frozen=True)
class TaskData:
    """The items of a task and where their images lie.

    Attributes:
        spec: the task.
        items: all of them, in the order of the files.
        pictures: where the images are.
        files: paths and digests of the files of items.
    """

    spec: TaskSpec
    items: tuple[TaskItem, ...]
    pictures: Store
    files: list[Any]


def open_task(
    task: str | os.PathLike[str] | TaskSpec,
    data: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
) -> TaskData:
    """The items of a task.

    Args:
        task: its name, a file that says what it is, or a ``TaskSpec``.
        data: the folder or .zip file with the files of items.
        images: the folder or .zip file with the images; that of the items if None.

    Raises:
        DataError: there is no such task, a file is missing or damaged, or an item lacks a field.
    """
    spec = task if isinstance(task, TaskSpec) else read_task(task)
    store = Store(data)
    pictures = store if images is None else Store(images)
    paths = [(store.find(file), category) for file, category in spec.items]
    items: dict[str, TaskItem] = {}
    for path, category in paths:
        where = f"{store.path}: {path}"
        # Rows of several files would be told apart by nothing.
        prefix = "" if len(paths) == 1 else f"{category or path}/"
        for key, row in _rows(store.read(path), path, where):
            item = _item(spec, row, key, category, prefix, f"{where}: item {key}")
            if item.id in items:
                raise DataError(f"{where}: expected each id once, got {item.id!r} twice.")
            items[item.id] = item
    if not items:
        raise DataError(f"{store.path}: expected at least one item, got none.")
    return TaskData(spec, tuple(items.values()), pictures, identity((store, p) for p, _ in paths))


def _rows(content: bytes, path: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each item of a file with its key: that of an object, else its row from 0."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} cannot be read as text ({error}).") from error
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _TREES:
        found = read_tree(text, where, _TREES[suffix])
        if isinstance(found, Mapping):
            pairs = [(str(key), row) for key, row in found.items()]
        elif isinstance(found, list):
            pairs = [(str(number), row) for number, row in enumerate(found)]
        else:
            raise DataError(f"{where}: expected a list or object of items, got {shown(found)}.")
    elif suffix in _LINES:
        pairs = [(str(number), row) for number, row in enumerate(_lines(text, where))]
    elif suffix in _TABLES:
        try:
            table = csv.DictReader(io.StringIO(text, newline=""), delimiter=_TABLES[suffix])
            pairs = [(str(number), row) for number, row in enumerate(table)]
        except csv.Error as error:
            raise DataError(f"{where} cannot be read as a table: {error}.") from error
    else:
        known = ", ".join((*_TREES, *_LINES, *_TABLES))
        raise DataError(f"{where}: expected items in a file of {known}.")
    for key, row in pairs:
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: item {key}: expected an object of fields, got {shown(row)}.")
        yield key, row


def _lines(text: str, where: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: line {number} cannot be read as JSON.") from error


def _item(
    spec: TaskSpec, row: Mapping[str, Any], key: str, category: str | None, prefix: str, where: str
) -> TaskItem:
    images, texts = (_values(row, fields, where) for fields in (spec.images, spec.texts))
    if not images or not texts or len(images) == len(texts) == 1:
        raise DataError(
            f"{where}: expected images and texts, several of one of them, got {len(images)} and "
            f"{len(texts)}."
        )
    for what, values in (("image", images), ("text", texts)):
        if len(set(values)) < len(values):
            raise DataError(f"{where}: expected each {what} once, got {shown(list(values))}.")
    if spec.id is not None:
        key = _text(row, spec.id, where)
    if spec.category is not None:
        category = _text(row, spec.category, where)
    return TaskItem(prefix + key, images, texts, category)


def _values(row: Mapping[str, Any], fields: tuple[str, ...], where: str) -> tuple[str, ...]:
    found: list[str] = []
    for field in fields:
        if isinstance(row.get(field), list):
            values = {str(number): value for number, value in enumerate(row[field])}
            found += [_text(values, number, f"{where}: {field}") for number in values]
        else:
            found.append(_text(row, field, where))
    return tuple(found)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    """A field that is a text, or a number, which is written as one."""
    if field not in row:
        raise DataError(f"{where}: expected a field {field!r}, got {', '.join(map(str, row))}.")
    value = row[field]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected {field!r} to be a text, got {shown(value)}.")
    return value
