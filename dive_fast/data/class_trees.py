"""Lists of classes as JSON and YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from dive_fast.core.numbers import is_whole
from dive_fast.data.class_tables import (
    Classes,
    checked_name,
    means_names,
    tell_numbers,
    with_prompts,
)
from dive_fast.errors import DataError, shown

_WORDNET = re.compile(r"n\d{8}")
_YOLO = ("train", "val", "test", "nc", "path", "download", "roboflow")
YAML_HINT = "; YAML reads no, on, null and 1 as something else unless they stand in quotes"


def read_json_classes(text: str, where: str) -> Classes:
    """JSON; see ``class_lists.read_classes``."""
    return _classes(read_tree(text, where, "JSON"), where, "")


def read_yaml_classes(text: str, where: str) -> Classes:
    """YAML; see ``class_lists.read_classes``. Only plain values are made of it."""
    return _classes(read_tree(text, where, "YAML"), where, YAML_HINT)


def read_tree(text: str, where: str, kind: str) -> Any:
    """The plain values of a text.

    Args:
        where: what a sentence calls it.
        kind: "JSON" or "YAML".

    Raises:
        DataError: it cannot be read as such, or a key stands twice.
    """
    read = _json if kind == "JSON" else _yaml
    try:
        return read(text, where)
    except RecursionError as error:
        raise DataError(f"{where} cannot be read as {kind}: it is nested too deeply.") from error
    except ValueError as error:  # also a date that is none, a key that stands twice
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} cannot be read as {kind}: {str(error).rstrip('.')}.") from error


def _json(text: str, where: str) -> Any:
    return json.loads(text, object_pairs_hook=_distinct_keys)


def _yaml(text: str, where: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise DataError(
            f"{where}: YAML needs PyYAML, which is not installed: pip install pyyaml."
        ) from error

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        """Refuses a key that stands twice, of which YAML would keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            pairs = [(self.construct_object(key, deep=True), None) for key, _ in node.value]
            if all(isinstance(key, Hashable) for key, _ in pairs):
                _distinct_keys(pairs)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}"
        reason = getattr(error, "problem", None) or type(error).__name__
        raise DataError(f"{where} cannot be read as YAML: {reason}{place}.") from error


def _distinct_keys(pairs: Sequence[tuple[Any, Any]]) -> dict:
    found: dict = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def _classes(tree: Any, where: str, hint: str) -> Classes:
    """The classes of any of the forms.

    Args:
        hint: what a sentence says behind a name that is no text.
    """
    if isinstance(tree, Mapping):
        tree = _inner(tree, where)
    if isinstance(tree, Mapping) and tree:
        return _of_mapping(tree, where, hint)
    if isinstance(tree, list) and tree:
        if all(isinstance(entry, Mapping) for entry in tree):
            return _of_categories(tree, where, hint)
        return [_name(entry, f"{where}: entry {i}", hint) for i, entry in enumerate(tree)]
    raise DataError(
        f"{where}: expected a list of names, or a mapping of numbers to names or of names to "
        f"prompts, got {'an empty one' if tree in ([], {}) else shown(tree)}."
    )


def _inner(tree: Mapping[Any, Any], where: str) -> Any:
    """Where the classes stand in a file that also holds something else."""
    if "id2label" in tree:
        return tree["id2label"]
    if isinstance(tree.get("categories"), list):
        return tree["categories"]
    names = tree.get("names")
    if isinstance(names, list | dict) and any(key in tree for key in _YOLO):
        if is_whole(tree.get("nc")) and tree["nc"] != len(names):
            raise DataError(f"{where}: expected nc {tree['nc']} names, got {len(names)}.")
        return names
    for key, value in tree.items():
        if means_names(key) and isinstance(value, list | dict) and len(tree) == 1:
            return value
        if key == "classes" and isinstance(value, list | dict):
            others = ", ".join(str(key) for key in tree if key != "classes")
            raise DataError(
                f"{where}: expected the classes alone, got {shown(others)} beside them."
            )
    return tree


def _of_categories(entries: list[Mapping[str, Any]], where: str, hint: str) -> Classes:
    """COCO's: each with a "name", and an "id" by which they are ordered."""
    places = [f"{where}: entry {i}" for i in range(len(entries))]
    for entry, place in zip(entries, places, strict=True):
        if "name" not in entry:
            raise DataError(f"{place}: expected an entry with a name, got {shown(entry)}.")
    names = [
        _name(entry["name"], place, hint) for entry, place in zip(entries, places, strict=True)
    ]
    numbers = [entry.get("id") for entry in entries]
    if all(number is None for number in numbers):
        return names
    for number, place in zip(numbers, places, strict=True):
        if not is_whole(number, 0):
            raise DataError(f"{place}: expected an id of 0 or more, got {shown(number)}.")
    return _by_number(numbers, names, where)


def _of_mapping(tree: Mapping[Any, Any], where: str, hint: str) -> Classes:
    numbers = [_as_number(key) for key in tree]
    if all(number is not None for number in numbers):
        names = [_name_of_number(key, value, where, hint) for key, value in tree.items()]
        return _by_number(numbers, names, where)
    for key, number in zip(tree, numbers, strict=True):
        if not isinstance(key, str) or number is not None:
            raise DataError(
                f"{where}: expected names as keys, or numbers, got {shown(key)} among them{hint}."
            )
    names = [_name(key, where, hint) for key in tree]
    values = list(tree.values())
    if all(is_whole(value, 0) for value in values):
        return _by_number(values, names, where)
    if all(isinstance(value, str) and _as_number(value) is not None for value in values):
        raise DataError(
            f"{where}: expected numbers without quotes, or prompts, got {values[0]!r} for "
            f"{names[0]!r}, which could be either."
        )
    prompts = [_prompts(name, value, where, hint) for name, value in tree.items()]
    return with_prompts(names, prompts, where)


def _as_number(key: Any) -> int | None:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10:
        return int(key)
    return key if is_whole(key, 0) else None


def _by_number(numbers: Sequence[int], names: Sequence[str], where: str) -> list[str]:
    ordered = sorted(zip(numbers, names, strict=True), key=lambda pair: pair[0])
    for (a, one), (b, two) in zip(ordered, ordered[1:], strict=False):
        if a == b:
            raise DataError(f"{where}: expected one name of class {a}, got {one!r} and {two!r}.")
    tell_numbers([number for number, _ in ordered], where)
    return [name for _, name in ordered]


def _name_of_number(key: Any, value: Any, where: str, hint: str) -> str:
    """A name, also one of ImageNet's class index: ["n01440764", "tench"]."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        if _WORDNET.fullmatch(value[0]):
            value = value[1]
    return _name(value, f"{where}: class {key}", hint)


def _name(value: Any, where: str, hint: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected the name of a class as text, got {shown(value)}{hint}.")
    return checked_name(value, where)


def _prompts(name: str, value: Any, where: str, hint: str) -> list[str]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts:
        raise DataError(
            f"{where}: expected a prompt or a list of them for the class {name!r}, got "
            f"{shown(value)}{hint}."
        )
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise DataError(
                f"{where}: expected prompts as text for the class {name!r}, got "
                f"{shown(prompt)}{hint}."
            )
    return prompts
