"""What a record must hold, by its kind: the one place that says it; docs/records.md explains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, NoReturn

from dive_fast.core.numbers import is_number, is_whole
from dive_fast.errors import RunError, shown

Kind = Literal["classification", "detection", "choice", "task"]
Record = Mapping[str, Any]

# Sums of many float32 probabilities are a little off.
_ROUNDING = 1e-3

# By these a record is known where a run does not say its kind.
_OF_DETECTIONS = {"boxes", "labels", "indices", "confidences", "class_probabilities"}
_OF_CHOICES = {"candidates", "candidate_losses"}
_OF_CLASSIFICATIONS = {"index", "probability", "top", "losses", "log_posterior"}

# Lists of a number for each class, which are most of a record of many classes.
NOT_IN_FIGURES = ("losses", "n_probes", "log_odds_bound")


@dataclass(frozen=True)
class Form:
    """What the records of one run must be.

    Attributes:
        kind: of the run; None where nothing says it: then each record is what its fields say, and
            one that says nothing is somebody's own and not looked at.
        names: the model's classes, where they are known.
        truths: the right class by id, where it is known: then it must be there, and the same.
        whole: whether a classification needs the lists, too, that no figure is made of:
            ``NOT_IN_FIGURES``.
    """

    kind: Kind | None = None
    names: Sequence[str] | None = None
    truths: Mapping[str, int] | None = None
    whole: bool = True

    def wrong(self, record: Record) -> str | None:
        """What is wrong with a record that has an ``id``, or None."""
        kind = self.kind or _kind_of(record)
        if kind == "classification":
            return _wrong(_require_classification, record, self.names, self.truths, self.whole)
        if kind == "choice":
            return _wrong(_require_choice, record)
        if kind == "task":
            return _wrong(_require_task, record)
        return None if kind is None else _wrong(_require_detection, record, self.names)


def check_figures(record: Record) -> None:
    """Looks at the fields that a summary of a classifier reads.

    Raises:
        RunError: one is missing, or of another type.
    """
    _raise(record, _wrong(_require_figures, record))


def check_detection(record: Record, names: Sequence[str]) -> None:
    """The same of a record of a detector that knows these classes."""
    _raise(record, _wrong(_require_detection, record, names))


def _raise(record: Record, wrong: str | None) -> None:
    if wrong is not None:
        raise RunError(f"the record {shown(record.get('id'))}: {wrong}.")


def _kind_of(record: Record) -> Kind | None:
    if not _OF_DETECTIONS.isdisjoint(record):
        return "detection"
    if not _OF_CHOICES.isdisjoint(record):
        return "choice"
    failed = "error" in record
    return "classification" if failed or not _OF_CLASSIFICATIONS.isdisjoint(record) else None


# -- what a record of a kind must hold -------------------------------------------------------------


def _require_classification(
    record: Record, names: Sequence[str] | None, truths: Mapping[str, int] | None, whole: bool
) -> None:
    _require_truth(record, names, truths)
    _require_groups(record)
    if "error" in record:
        _require_text(record, "error")
    else:
        _require_answer(record, names, whole)


def _require_detection(record: Record, names: Sequence[str] | None) -> None:
    if "error" in record:
        _require_text(record, "error")
    else:
        _require_objects(record, names)


def _require_choice(record: Record) -> None:
    if "error" in record:
        _require_text(record, "error")
        return
    _require_each(record, "candidates", _is_text, "of texts")
    n = len(record["candidates"])
    _require_row(record, "choice", n)
    _require_text(record, "text")
    if record["text"] != record["candidates"][record["choice"]]:
        _fail(f"'text' to be candidate {record['choice']}", record["text"])
    _require(record, "probability", _is_share, _SHARE)
    _require(record, "margin", _is_number_or_null, "a number or null")
    for name in ("candidate_losses", "candidate_log_posterior"):
        _require_each(record, name, _is_number_or_null, "of numbers or null", _floats_or_null)
        _require_length(record, name, n)
    what = "of whole numbers of at least 0"
    _require_each(record, "candidate_probes", _is_row, what, _rows)
    _require_length(record, "candidate_probes", n)
    _require_cost(record)


def _require_task(record: Record) -> None:
    if "category" in record:
        _require_text(record, "category")
    if "error" in record:
        _require_text(record, "error")
        return
    what = "an object of text, image and group, true or false"
    _require(record, "right", lambda value: isinstance(value, dict), what)
    for name, value in record["right"].items():
        if name not in ("text", "image", "group") or not isinstance(value, bool):
            _fail(f"'right' to be {what}", record["right"])
    _require_each(record, "losses", _are_numbers_or_null, "of lists of numbers or null")
    _require_cost(record)


def _require_figures(record: Record) -> None:
    if "error" in record:
        _require_text(record, "error")
        return
    _require_row(record, "truth", None)
    _require_row(record, "index", None)
    _require(record, "probability", _is_share, _SHARE)
    _require_cost(record)


def _require_truth(
    record: Record, names: Sequence[str] | None, truths: Mapping[str, int] | None
) -> None:
    right = None if truths is None else truths.get(record["id"])
    if right is None and "truth" not in record:
        return
    _require_row(record, "truth", None if names is None else len(names))
    if right is not None and record["truth"] != right:
        _fail(f"'truth' to be {right} as in the data", record["truth"])


def _require_groups(record: Record) -> None:
    if "groups" in record:
        what = "an object of texts, numbers, or true or false"
        _require(record, "groups", lambda x: isinstance(x, dict), what)
        for value in record["groups"].values():
            if not (_is_text(value) or isinstance(value, bool) or is_number(value)):
                _fail(f"'groups' to be {what}", value)


def _require_answer(record: Record, names: Sequence[str] | None, whole: bool) -> None:
    _require_text(record, "label")
    _require_row(record, "index", None if names is None else len(names))
    _require(record, "probability", _is_share, _SHARE)
    _require_each(record, "top", _is_ranked, 'of {"label", "index", "score"}')
    lists = ("losses", "log_posterior", "log_odds_bound") if whole else ("log_posterior",)
    for name in lists:
        _require_each(record, name, _is_number_or_null, "of numbers or null", _floats_or_null)
    classes = len(record[lists[0]]) if names is None else len(names)
    if whole:
        what = "of whole numbers of at least 0"
        _require_each(record, "n_probes", _is_row, what, _rows)
    for name in (*lists, "n_probes") if whole else lists:
        _require_length(record, name, classes)
    _require_row(record, "index", classes)
    _require_each(record, "eliminated", _below(classes), f"of rows in [0, {classes})")
    top = [(entry["index"], entry["label"]) for entry in record["top"]]
    for row, _ in top:
        if row >= classes:
            _fail(f"'top' to hold rows in [0, {classes})", row)
    if top and top[0][0] != record["index"]:
        _fail(f"'top' to begin with row {record['index']}, the answer", top[0][0])
    _require_names([(record["index"], record["label"]), *top], names)
    _require_cost(record)


def _require_objects(record: Record, names: Sequence[str] | None) -> None:
    _require_each(record, "boxes", _is_box, "of boxes [left, top, right, bottom] of some size")
    n = len(record["boxes"])
    _require_each(record, "labels", _is_text, "of texts")
    rows = "of whole numbers of at least 0" if names is None else f"of rows in [0, {len(names)})"
    _require_each(record, "indices", _is_row if names is None else _below(len(names)), rows)
    _require_each(record, "confidences", _is_share, "of numbers in [0, 1]")
    for name in ("labels", "indices", "confidences"):
        _require_length(record, name, n)
    _require_names(zip(record["indices"], record["labels"], strict=True), names)
    if "class_probabilities" in record:
        what = "of lists of numbers in [0, 1] that sum to at most 1"
        _require_each(record, "class_probabilities", _are_shares, what)
        _require_length(record, "class_probabilities", n)
        classes = {len(names)} if names is not None else set()
        if len(found := classes | {len(row) for row in record["class_probabilities"]}) > 1:
            _fail("'class_probabilities' to be of the same classes for all", sorted(found))
    if "drawn" in record:
        _require_text(record, "drawn")
    _require_cost(record)


def _require_cost(record: Record) -> None:
    _require_row(record, "evaluations", None)
    _require(record, "seconds", lambda x: is_number(x, 0), "a number of at least 0")


def _require_names(pairs: Iterable[tuple[int, str]], names: Sequence[str] | None) -> None:
    """Rows and labels must mean the same classes."""
    for row, label in pairs if names is not None else ():
        if label != names[row]:
            _fail(f"row {row} to have the label {names[row]!r}", label)


# -- single fields ---------------------------------------------------------------------------------

_SHARE = "a number in [0, 1]"


def _require(record: Record, name: str, ok: Callable[[object], bool], what: str) -> None:
    if name not in record:
        raise _WrongRecord(f"expected a record with '{name}', got one without")
    if not ok(record[name]):
        _fail(f"'{name}' to be {what}", record[name])


def _require_text(record: Record, name: str) -> None:
    _require(record, name, _is_text, "a text")


def _require_row(record: Record, name: str, classes: int | None) -> None:
    if classes is None:
        _require(record, name, _is_row, "a whole number of at least 0")
    else:
        _require(record, name, _below(classes), f"a row in [0, {classes})")


def _require_each(
    record: Record,
    name: str,
    ok: Callable[[object], bool],
    what: str,
    all_ok: Callable[[list], bool] = lambda values: False,
) -> None:
    """A list; says which of its items is wrong, for it may be long.

    Args:
        all_ok: says quickly that all are right; they are looked at one by one where it does not.
    """
    _require(record, name, lambda value: isinstance(value, list), f"a list {what}")
    if all_ok(record[name]):
        return
    for position, item in enumerate(record[name]):
        if not ok(item):
            raise _WrongRecord(
                f"expected '{name}' to be a list {what}, got {shown(item)} at position {position}"
            )


def _require_length(record: Record, name: str, n: int) -> None:
    if len(record[name]) != n:
        _fail(f"'{name}' to have {n} items", len(record[name]))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_row(value: object) -> bool:
    return is_whole(value, 0)


def _below(classes: int) -> Callable[[object], bool]:
    return lambda value: _is_row(value) and value < classes


def _is_share(value: object) -> bool:
    return is_number(value, 0) and value <= 1


def _are_shares(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_share, value)) and sum(value) <= 1 + _ROUNDING


def _is_number_or_null(value: object) -> bool:
    return value is None or is_number(value)


def _are_numbers_or_null(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number_or_null, value))


def _floats_or_null(values: list) -> bool:
    """Whether they are nothing but finite floats, whose sum is finite, too, and null."""
    return set(map(type, values)) <= {float, type(None)} and isfinite(sum(filter(None, values)))


def _rows(values: list) -> bool:
    """Whether they are nothing but whole numbers of at least 0."""
    return set(map(type, values)) <= {int} and min(values, default=0) >= 0


def _is_box(value: object) -> bool:
    if not (isinstance(value, list) and len(value) == 4 and all(map(is_number, value))):
        return False
    left, top, right, bottom = value
    return left < right and top < bottom


def _is_ranked(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("label"))
        and _is_row(value.get("index"))
        and _is_share(value.get("score"))
    )


class _WrongRecord(Exception):
    """What is wrong, without the place; caught in this file."""


def _wrong(require: Callable[..., None], record: Record, *known: object) -> str | None:
    try:
        require(record, *known)
    except _WrongRecord as error:
        return str(error)
    return None


def _fail(what: str, got: object) -> NoReturn:
    raise _WrongRecord(f"expected {what}, got {shown(got)}")
