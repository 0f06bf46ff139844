"""The one reader of values that a configuration states: of their type and in range, or refused.

A file that was edited, cut or made by another program may hold anything where a number belongs.
Every value that this library computes with is read here, and what is wrong is one sentence:

    grid in layout must be a whole number of at least 2, got '7'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dive_fast.core.numbers import is_number, is_whole
from dive_fast.errors import ModelError, shown

LARGEST = 2**31 - 1  # of whole numbers, unless said: no size or count of a model is above
LARGEST_FLOAT = 3e38  # what float32 can hold, in which models compute
REQUIRED: Any = object()


class Config:
    """The entries of a JSON object. Every method takes what to answer where an entry is not stated
    (missing or null); without that it must be stated.

    Args:
        where: what the sentences call it, a path as a rule.
        content: what was read.

    Raises:
        ModelError: the content is no object; and by each method, the entry is of another type or
            out of range.
    """

    def __init__(self, where: str | Path, content: Any) -> None:
        if not isinstance(content, Mapping):
            raise ModelError(f"{where} must be a JSON object, got {shown(content)}.")
        self.where, self.content = where, content

    def number(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        above: float = -math.inf,
        at_least: float = -math.inf,
        at_most: float = LARGEST_FLOAT,
    ) -> float:
        """A number that float32 can hold."""
        value = self._stated(key, default)
        if value is default:
            return value
        if not (is_number(value, at_least) and value > above and value <= at_most):
            limit = math.inf if at_most == LARGEST_FLOAT else at_most
            self._refuse(key, "a finite number" + _range(above, at_least, limit), value)
        return float(value)

    def whole(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        at_least: float = -math.inf,
        at_most: float = LARGEST,
    ) -> int:
        """A whole number, not written as 1.0."""
        value = self._stated(key, default)
        if value is default:
            return value
        if not (is_whole(value, at_least) and value <= at_most):
            # The bound that goes without saying is said to whoever crosses it.
            unsaid = at_most == LARGEST and not (is_whole(value) and value > at_most)
            limits = _range(-math.inf, at_least, math.inf if unsaid else at_most)
            self._refuse(key, "a whole number" + limits, value)
        return value

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """A text, which may be empty."""
        value = self._stated(key, default)
        if value is not default and not isinstance(value, str):
            self._refuse(key, "a text", value)
        return value

    def one_of(self, key: str, allowed: Sequence[str], default: Any = REQUIRED) -> str:
        """One of these texts."""
        value = self._stated(key, default)
        # A list is no text, and cannot be looked up everywhere.
        if value is not default and not (isinstance(value, str) and value in allowed):
            self._refuse(key, f"one of {', '.join(allowed)}", value)
        return value

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """True or false, not 1 or "false"."""
        value = self._stated(key, default)
        if value is not default and not isinstance(value, bool):
            self._refuse(key, "true or false", value)
        return value

    def numbers(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        at_least: float = -math.inf,
        at_most: float = LARGEST_FLOAT,
    ) -> tuple[float, ...]:
        """A list of numbers that float32 can hold."""
        value = self._stated(key, default)
        if value is default:
            return value
        good = isinstance(value, list | tuple)
        if not (good and all(is_number(x, at_least) and x <= at_most for x in value)):
            limit = math.inf if at_most == LARGEST_FLOAT else at_most
            limits = _range(-math.inf, at_least, limit, "each ")
            self._refuse(key, "a list of finite numbers" + limits, value)
        return tuple(map(float, value))

    def whole_list(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        length: int | None = None,
        at_least: float = -math.inf,
        at_most: float = LARGEST,
    ) -> tuple[int, ...]:
        """A list of whole numbers, so many if ``length`` is given."""
        value = self._stated(key, default)
        if value is default:
            return value
        good = isinstance(value, list | tuple) and length in (None, len(value))
        if not (good and all(is_whole(x, at_least) and x <= at_most for x in value)):
            count = "" if length is None else f"{length} "
            unsaid = at_most == LARGEST
            limits = _range(-math.inf, at_least, math.inf if unsaid else at_most, "each ")
            self._refuse(key, f"a list of {count}whole numbers" + limits, value)
        return tuple(value)

    def _stated(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        return default if value is None and default is not REQUIRED else value

    def _refuse(self, key: str, expected: str, value: Any) -> NoReturn:
        got = shown(value) if key in self.content else "none"
        raise ModelError(f"{key} in {self.where} must be {expected}, got {got}.")


def _range(above: float, at_least: float, at_most: float, each: str = "") -> str:
    """ " from 1 to 4096", " above 0", " of at least 2", or nothing."""
    if above > -math.inf:
        return f" {each}above {above:g}" + ("" if at_most == math.inf else f", at most {at_most:g}")
    if at_least > -math.inf and at_most < math.inf:
        return f" {each}from {at_least} to {at_most}"
    if at_least > -math.inf:
        return f" {each or 'of '}at least {at_least}"
    return "" if at_most == math.inf else f" {each or 'of '}at most {at_most}"
