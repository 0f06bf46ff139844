"""Layouts in words: prompts with location tokens, as GeoDiffusion writes them (arXiv 2306.04607).

    An image with cat <l514> <l33410> traffic light <l0> <l1285>

An object is the phrase of its class, then the tokens of its top-left and its bottom-right corner on
a G x G grid, in the order of ``dive_fast.core.layouts``:

    <l{i}>,     i = round(y (G - 1)) G + round(x (G - 1)),     x, y in [0, 1]

Objects stand in any order. Published checkpoints hold a ``generation_config.json`` with the
template, the grid (``num_bucket_per_side``), ``max_num_bbox`` and the size of the images.

Source: ``tokenize_coordinates``, ``token_pair_from_bbox`` and the prompts in
``utils/data/nuimage.py`` and ``utils/data/coco_stuff.py``; ``bbox_encode`` and ``class2text`` in
``utils/generation_utils.py``; all of https://github.com/KaiChen1998/GeoDiffusion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.core.numbers import is_whole
from dive_fast.errors import ModelError, shown
from dive_fast.models.files.checkpoint import read_json
from dive_fast.models.files.sidecar import FILE, read_extra
from dive_fast.models.text.prompts import Classes, ClassPrompts, require_classes

OBJECTS = "{bbox}"
DEFAULT_TEMPLATE = f"An image with {OBJECTS}"
CONFIG = "generation_config.json"
LARGEST_IMAGE = 8192  # sides in pixels
TOKENIZER_FILES = ("added_tokens.json", "tokenizer.json", "tokenizer_config.json")


def location_token(i: int) -> str:
    """The token of cell i of the grid."""
    return f"<l{i}>"


@dataclass(frozen=True)
class LocationPrompts:
    """How the layouts of one model are written.

    Attributes:
        names: of the classes.
        phrases: what stands for each class in a prompt.
        template: with ``{bbox}`` where the objects go.
        grid: G.
        max_objects: of a prompt in the training; None where it is not known.
    """

    names: tuple[str, ...]
    phrases: tuple[str, ...]
    template: str
    grid: int
    max_objects: int | None = None

    def write(self, objects: Sequence[tuple[int, int, int]]) -> str:
        """The prompt of objects (class, cell of the top-left and of the bottom-right corner)."""
        words = [
            f"{self.phrases[c]} {location_token(first)} {location_token(second)}"
            for c, first, second in objects
        ]
        return self.template.replace(OBJECTS, " ".join(words))


def has_location_tokens(directory: Path) -> bool:
    """Whether the tokenizer of a model directory knows ``<l0>``.

    Only the files' text is searched: to build a tokenizer of 65,536 added tokens takes seconds.
    """
    wanted = f'"{location_token(0)}"'
    paths = (directory / "tokenizer" / name for name in TOKENIZER_FILES)
    return any(wanted in _text(path) for path in paths)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        # Missing is usual; what is wrong with the others, their reader will say.
        return ""


def read_config(directory: Path) -> dict[str, Any]:
    """``generation_config.json``, or nothing where there is none.

    Raises:
        ModelError: it cannot be read.
    """
    path = directory / CONFIG
    return read_json(path) if path.exists() else {}


def read_prompts(
    directory: Path,
    n_tokens: int,
    classes: Classes | None,
    templates: Sequence[str] | None,
) -> LocationPrompts:
    """How the model of a directory writes layouts; what is None is what the directory states.

    ``dive_fast.json`` ("classes", "templates", "max_objects") comes before
    ``generation_config.json``.

    Args:
        n_tokens: location tokens of its tokenizer.
        classes: names, of which hyphens become spaces as in GeoDiffusion's prompts, or a mapping
            from each name to its phrase.
        templates: a list of one, with ``{bbox}`` (or ``{}``) where the objects go.

    Raises:
        ModelError: there are no classes, they or the template cannot be used, or the grid is not
            square.
    """
    config, extra = read_config(directory), read_extra(directory)
    chosen = require_classes(directory, classes)
    names, phrases = _phrases(chosen)
    if templates is None:
        templates = extra.get("templates")
    if templates is None:
        templates = [config.get("prompt_template", DEFAULT_TEMPLATE)]
    grid = _grid(n_tokens, config.get("num_bucket_per_side"), directory)
    limit = extra.get("max_objects", config.get("max_num_bbox"))
    if limit is not None and not is_whole(limit, 1):
        raise ModelError(
            f"expected at least 1 object as max_num_bbox in {directory / CONFIG} (or max_objects "
            f"in {FILE}), got {shown(limit)}."
        )
    return LocationPrompts(names, phrases, _template(templates), grid, limit)


def read_size(directory: Path) -> int | None:
    """The side of the images in pixels, None where the directory does not state it.

    Raises:
        ModelError: it states no square.
    """
    config = read_config(directory)
    sides = (config.get("width"), config.get("height"))
    if sides == (None, None):
        return None
    if sides[0] != sides[1] or not is_whole(sides[0], 1) or sides[0] > LARGEST_IMAGE:
        raise ModelError(
            f"expected square images in {directory / CONFIG} of at most {LARGEST_IMAGE} pixels, "
            f"got width {shown(sides[0])} and height {shown(sides[1])}."
        )
    return sides[0]


def _phrases(classes: Classes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and phrases."""
    if not isinstance(classes, Mapping):
        made = ClassPrompts.make(classes, ["{}"])
        return made.names, tuple(name.replace("-", " ") for (name,) in made.prompts)
    made = ClassPrompts.make(classes)
    for name, prompts in zip(made.names, made.prompts, strict=True):
        if len(prompts) != 1:
            raise ModelError(
                f"expected one phrase for the class {name!r} in a prompt with location tokens, "
                f"got {len(prompts)}."
            )
        if not prompts[0].strip():
            raise ModelError(f"the class {name!r} needs a phrase that is not empty.")
    return made.names, tuple(prompts[0] for prompts in made.prompts)


def _template(templates: Any) -> str:
    if isinstance(templates, str) or not isinstance(templates, Sequence) or len(templates) != 1:
        raise ModelError(
            f"a model with location tokens takes a list of one template, got {templates!r}."
        )
    template = templates[0]
    if isinstance(template, str):
        template = template.replace("{}", OBJECTS)
    if not isinstance(template, str) or template.count(OBJECTS) != 1:
        raise ModelError(
            f"the template of a model with location tokens needs {OBJECTS} once, where the objects "
            f"go, got {template!r}."
        )
    if left := [field for field in re.findall(r"\{\w*\}", template) if field != OBJECTS]:
        raise ModelError(
            f"the template {template!r} needs a value for {left[0]}: give it written out, as in "
            f"templates=[{template.replace(left[0], 'front')!r}] or --template."
        )
    return template


def _grid(n_tokens: int, stated: Any, directory: Path) -> int:
    """G of the location tokens; ``stated`` is [columns, rows] of the grid, or None."""
    side = math.isqrt(n_tokens)
    if stated is None:
        if side**2 != n_tokens or side < 2:
            raise ModelError(
                f"expected the location tokens of a square grid in {directory / 'tokenizer'}, "
                f"got {n_tokens}."
            )
        return side
    if not isinstance(stated, list) or len(stated) != 2 or not all(is_whole(n, 2) for n in stated):
        raise ModelError(
            f"expected two numbers above 1 as num_bucket_per_side in {directory / CONFIG}, "
            f"got {shown(stated)}."
        )
    if stated[0] != stated[1]:
        raise ModelError(
            f"expected location tokens on a square grid, got {stated[0]} columns and {stated[1]} "
            f"rows (num_bucket_per_side in {directory / CONFIG}), which is not supported."
        )
    if stated[0] ** 2 != n_tokens:
        raise ModelError(
            f"expected {stated[0] ** 2} location tokens in {directory / 'tokenizer'}, one for each "
            f"cell of the {stated[0]} x {stated[0]} grid, got {n_tokens}."
        )
    return stated[0]
