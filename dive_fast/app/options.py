"""What can be asked of a model on the page, and what its boxes say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from typing import Any

from dive_fast.app.asking import Question
from dive_fast.app.shelf import Entry
from dive_fast.errors import DiveFastError, shown
from dive_fast.strategies import resolve_strategy, strategy_names
from dive_fast.strategies.layout import layout_strategy_names


def question_about(
    entry: Entry,
    picture: str,
    strategy: str | None,
    settings: Mapping[str, Any],
    probes: int | None,
    seed: int | None,
    where: bool,
) -> Question:
    """The question, with the settings that its strategy has and that were given."""
    options = strategies_of(entry)
    strategy = strategy or options[0]
    if strategy not in options:
        raise DiveFastError(f"expected a strategy of {', '.join(options)}, got {strategy!r}.")
    known = settings_of(entry, strategy)
    given = {k: v for k, v in settings.items() if k in known and v is not None}
    return Question(picture, strategy, given, probes, seed or 0, bool(where))


def strategies_of(entry: Entry) -> tuple[str, ...]:
    return layout_strategy_names() if entry.detects else strategy_names()


def settings_of(entry: Entry, strategy: str) -> set[str]:
    """Names of what can be set of a strategy of classes."""
    if entry.detects or strategy not in strategy_names():
        return set()
    return {field.name for field in fields(resolve_strategy(strategy, None, {}))}


def classes_of(entry: Entry) -> tuple[str, ...]:
    """The classes that a text-conditional model was loaded with."""
    return entry.first.names if entry.first is not None else ()


def verb_of(entry: Entry) -> str:
    return "Find objects" if entry.detects else "Classify"


def hint_of(entry: Entry) -> str:
    """What the model sees of a picture, and what it may answer."""
    predictor = entry.predictor
    side = predictor.model.image_shape[1]
    seen = "the whole picture, squashed to" if entry.detects else "the central square, at"
    sentence = f"{entry.source} sees {seen} {side} x {side} pixels."
    if not entry.prompted:
        names = predictor.names
        sentence += f" It knows {len(names):,} classes: {_listed(names)}."
    return f'<p class="note">{escape(sentence)}</p>'


def _listed(names: Sequence[str], at_most: int = 10) -> str:
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more:,} more" if more > 0 else "")


def whole_number(what: str, text: str | None) -> int | None:
    """The number in a box, None where it is empty.

    Raises:
        DiveFastError: no whole number.
    """
    text = str("" if text is None else text).strip()
    try:
        return int(text) if text else None
    except ValueError as error:
        raise DiveFastError(f"expected a whole number as {what}, got {shown(text)}.") from error
