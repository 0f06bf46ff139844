"""What was left out or changed when annotations were read, and how much of it is told."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

AT_MOST = 5  # lines; a file whose every entry is bad would print as many as it has entries

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 60, 60, 40


@dataclass(frozen=True)
class Problem:
    """One sentence.

    Attributes:
        kind: problems of one kind are counted together.
        sentence: with its full stop.
        whole_file: it is about the file and not about one entry, and is told first.
    """

    kind: str
    sentence: str
    whole_file: bool = False


class Problems:
    """Collects the problems of one file."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._found: list[Problem] = []

    def add(self, kind: str, what: str, whole_file: bool = False) -> None:
        """``what`` has neither the file's name nor a full stop."""
        self._found.append(Problem(kind, f"{self.source}: {what}.", whole_file))

    def extend(self, others: Iterable[Problem]) -> None:
        self._found.extend(others)

    def first(self) -> str:
        """The first problem in brackets, for a sentence that refuses the file; or nothing."""
        if not self._found:
            return ""
        return f" ({self._found[0].sentence.removeprefix(f'{self.source}: ').rstrip('.')})"

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._found)


def told(problems: Iterable[Problem], source: str) -> list[str]:
    """All sentences if they are few, else one for each kind and how often it occurred.

    Beyond five kinds the rarest are only counted. What is about the whole file comes first.
    """
    problems = sorted(problems, key=lambda problem: not problem.whole_file)
    if len(problems) <= AT_MOST:
        return [problem.sentence for problem in problems]
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    groups = sorted(kinds.values(), key=lambda group: (not group[0].whole_file, -len(group)))
    lines = [_line(group) for group in groups[:AT_MOST]]
    if rest := groups[AT_MOST:]:
        count = sum(map(len, rest))
        lines.append(f"{source}: {count:,} more problems of {len(rest)} other kinds.")
    return lines


def tell_all(problems: Iterable[Problem], source: str, tell: Callable[[str], object]) -> None:
    """Gives ``tell`` the sentences of ``told`` one by one."""
    for line in told(problems, source):
        tell(line)


def short(value: object) -> str:
    """A value of a file for a sentence: quoted, on one line, cut where it is long or deep."""
    return _REPR.repr(value)


def _line(group: list[Problem]) -> str:
    first = group[0].sentence
    if len(group) == 1:
        return first
    return f"{first.rstrip('.')}; and {len(group) - 1:,} more like it."
