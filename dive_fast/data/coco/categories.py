"""The categories of an annotation file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dive_fast.data.coco.ids import Id, as_id
from dive_fast.data.coco.problems import Problems, short
from dive_fast.errors import DataError

_NO_PARENT = (None, "", "none")


def read_categories(
    path: Path, entries: list, annotations: list, problems: Problems
) -> dict[Id, str]:
    """The names of the categories that count, by id, in the file's order.

    Of several with one name the one that annotations refer to counts. A category that is only the
    root of the others' tree (an exporter's "cells" above "RBC" and "WBC", without boxes) is no
    class.

    Raises:
        DataError: there is none, one without a usable id or name, an id that occurs twice, or a
            name of several categories that annotations refer to. Without its categories a file
            means nothing, so a bad one is no single problem.
    """
    for entry in entries:
        good = isinstance(entry, dict) and as_id(entry.get("id")) is not None
        if not (good and isinstance(entry.get("name"), str)):
            raise DataError(
                f"{path}: expected categories with a whole number or a text as id and a name, got "
                f"{short(entry)}."
            )
    if not entries:
        raise DataError(f"{path}: expected at least one category, got none.")
    ids = [as_id(entry["id"]) for entry in entries]
    number, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: the category id {number!r} occurs {count} times.")
    used = _used(annotations)
    parents = {e.get("supercategory") for e in entries if _is_text(e.get("supercategory"))}
    names = {
        number: entry["name"]
        for number, entry in zip(ids, entries, strict=True)
        if number in used or not _is_root(entry, parents)
    }
    return _single(path, names, used, problems)


def _used(annotations: list) -> set[Id | None]:
    return {as_id(a.get("category_id")) for a in annotations if isinstance(a, dict)}


def _is_root(entry: dict, parents: set[str]) -> bool:
    parent = entry.get("supercategory")
    return entry["name"] in parents and (not _is_text(parent) or parent in _NO_PARENT)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _single(path: Path, names: dict[Id, str], used: set, problems: Problems) -> dict[Id, str]:
    """One category of each name."""
    kept = dict(names)
    for name, count in Counter(names.values()).items():
        if count == 1:
            continue
        alike = [number for number, other in names.items() if other == name]
        referred = [number for number in alike if number in used]
        if len(referred) > 1:
            raise DataError(
                f"{path}: the category name {name!r} occurs {count} times, and annotations refer "
                f"to its ids {_listed(referred)}; give each class one id and one name."
            )
        chosen = (referred or alike)[0]
        for number in alike:
            if number != chosen:
                del kept[number]
        others = _listed(number for number in alike if number != chosen)
        problems.add(
            "category of a name that is there",
            f"category {others}: the name {name!r} is that of category {chosen!r} too, and no "
            "annotation refers to it; left out",
        )
    return kept


def _listed(ids: Iterable[Id]) -> str:
    return ", ".join(map(repr, ids))
