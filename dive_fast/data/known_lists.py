"""Known lists of classes and templates, read from the packages that keep them.

``open_clip:imagenet`` is ImageNet's class names as CLIP's authors curated them,
``open_clip:openai`` their 80 templates; ``clip_benchmark`` has those of more data sets. Of a
package only the file with the lists is read: none is imported, nor what it depends on (torchvision
among it).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from dive_fast.errors import DataError

_INSTALL = {
    "open_clip": "pip install 'dive_fast[clip]'",
    "clip_benchmark": "pip install --no-deps clip-benchmark",
}
_OPEN_CLIP_CLASSES = {"imagenet": "IMAGENET_CLASSNAMES"}
_OPEN_CLIP_TEMPLATES = {
    "openai": "OPENAI_IMAGENET_TEMPLATES",
    "simple": "SIMPLE_IMAGENET_TEMPLATES",
}


def is_known_list(text: str) -> bool:
    """Whether a text names a package's list, such as ``open_clip:imagenet``."""
    return text.partition(":")[0] in _INSTALL and ":" in text


def known_classes(text: str) -> list[str]:
    """The class names of ``open_clip:imagenet`` or ``clip_benchmark:NAME``, in their order.

    Raises:
        DataError: the package is not installed, or has no such list.
    """
    if text.startswith("open_clip:"):
        return list(_of_open_clip(text, _OPEN_CLIP_CLASSES))
    return list(_of_clip_benchmark(text, "en_classnames.json"))


def known_templates(text: str) -> list[str]:
    """The templates of ``open_clip:openai``, ``open_clip:simple`` or ``clip_benchmark:NAME``.

    Returns:
        Each with ``{}`` where the name of a class goes.

    Raises:
        DataError: as ``known_classes``, or a template has no place for the name.
    """
    if text.startswith("open_clip:"):
        # Its templates are functions of a class's name.
        found = [template("{}") for template in _of_open_clip(text, _OPEN_CLIP_TEMPLATES)]
    else:
        listed = _of_clip_benchmark(text, "en_zeroshot_classification_templates.json")
        found = [template.replace("{c}", "{}") for template in listed]
    if wrong := [template for template in found if "{}" not in template]:
        raise DataError(f"{text}: expected templates with a place for the class, got {wrong[0]!r}.")
    return found


def _of_open_clip(text: str, lists: Mapping[str, str]) -> Any:
    attribute = _chosen(text, lists)
    path = _package_file(text, "zero_shot_metadata.py")
    loader = SourceFileLoader("open_clip_zero_shot_metadata", str(path))
    module = ModuleType(loader.name)
    try:
        loader.exec_module(module)
        return getattr(module, attribute)
    except Exception as error:  # another version of the package
        raise DataError(f"{text}: {path} cannot be read ({error}).") from error


def _of_clip_benchmark(text: str, file: str) -> list[str]:
    path = _package_file(text, f"datasets/{file}")
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
        return list(_chosen(text, lists))
    except DataError:
        raise
    except (OSError, ValueError, TypeError) as error:  # another version of the package
        raise DataError(f"{text}: {path} cannot be read ({error}).") from error


def _package_file(text: str, file: str) -> Path:
    """A file of the package that a list is named after, which is not imported."""
    package = text.partition(":")[0]
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (path := Path(folder, file)).is_file():
            return path
    missing = f"has no {file} in the version here" if found else "is not installed"
    raise DataError(f"{text}: {package} {missing}: {_INSTALL[package]}.")


def _chosen(text: str, lists: Mapping[str, Any]) -> Any:
    package, _, name = text.partition(":")
    if name not in lists:
        raise DataError(f"{text}: expected one of {package}'s lists {', '.join(lists)}.")
    return lists[name]
