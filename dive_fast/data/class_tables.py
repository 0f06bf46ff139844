"""Lists of classes as tables and as lines."""

from __future__ import annotations

import csv
import io
import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from dive_fast.core.distinct import told_apart
from dive_fast.core.names import comparable
from dive_fast.errors import DataError, some

log = logging.getLogger(__name__)

# Names, or names to their prompts.
Classes: TypeAlias = "list[str] | dict[str, list[str]]"

# What the columns are called, without blanks, underscores and case.
_COLUMNS = {
    "classname": "classname classnames class classes name names label labels labelname category "
    "categories categoryname displayname",
    "classidx": "classidx classindex classid idx index id labelidx labelid labelindex categoryid",
    "prompt": "prompt prompts caption text",
}
_ROLE = {name: role for role, names in _COLUMNS.items() for name in names.split()}

DELIMITERS = ",;\t|"
# A list may begin with one of these, but a column is called so more often.
_LONE_HEADERS = frozenset(f"{_COLUMNS['classname']} {_COLUMNS['classidx']} prompt prompts".split())

_WHOLE = re.compile(r"\d+")
_WORDNET = re.compile(r"(n\d{8})[\s,:]+(\S.*)")
# Numbers before or behind a name.
_NUMBERED = re.compile(r"(?P<id>\d+)\s*[,;:\t]\s*(?P<name>.*)")
_NUMBERED_BEHIND = re.compile(r"(?P<name>.*?)\s*[,;\t]\s*(?P<id>\d+)")
# With blanks alone between, "2 door car" may be a name: these need to be a count.
_COUNTED = re.compile(r"(?P<id>\d+)(?:\s*[.)=-]\s*|\s+)(?P<name>.+)")
_COUNTED_BEHIND = re.compile(r"(?P<name>.+?)(?:\s*[:=-]\s*|\s+)(?P<id>\d+)")


class Row(NamedTuple):
    """What a line says of a class; None where it says nothing."""

    line: int
    name: str
    number: str | None = None
    prompt: str | None = None


Cells: TypeAlias = "list[tuple[int, list[str]]]"  # of each row, with the number of its line


def read_table(text: str, where: str, delimiters: str = DELIMITERS) -> Classes:
    """A table of classes; see ``class_lists.read_classes``.

    Args:
        text: the whole file.
        where: what a sentence calls it.
        delimiters: what may lie between the cells; the header, or else the rows, say which.
    """
    tables, errors = [], []
    for delimiter in delimiters:
        try:
            tables.append(_cells(text, delimiter))
        except csv.Error as error:
            errors.append(error)
    if not tables:
        raise DataError(f"{where} cannot be read as a table: {errors[0]}.")
    for fits in (_has_header, _has_numbers, _is_rectangle):
        for cells in tables:
            if fits(cells):
                return _read_cells(cells, where)
    return _read_cells(tables[0], where)


def read_lines(text: str, where: str) -> Classes:
    """One class a line; see ``class_lists.read_classes``."""
    lines = [(i, line.strip()) for i, line in enumerate(_split(text), start=1) if line.strip()]
    _refuse_other_languages(lines, where)
    first = lines[0][1]
    for delimiter in DELIMITERS:
        if _is_table(text, first, delimiter):
            return read_table(text, where, delimiter)
    if _key(first) in ("classname", "classnames"):
        return read_table(text, where, "\t")
    _refuse_header(first, where)
    if all(line[0] == line[-1] == '"' and len(line) > 1 for _, line in lines):
        return read_table(text, where, ",")
    if all(line[0] == line[-1] == "'" and len(line) > 1 for _, line in lines):
        lines = [(i, line[1:-1]) for i, line in lines]
    lines = _without_wordnet_ids(lines)
    rows = _numbered(lines, where) or [Row(i, line) for i, line in lines]
    for row in rows:
        if "\t" in row.name:
            raise DataError(
                f"{where}: expected one class a line, got several columns in line {row.line}; a "
                "table needs a header and the suffix .tsv or .csv."
            )
    if len(rows) == 1 and re.search("[,;|]", rows[0].name):
        raise DataError(
            f"{where}: expected one class a line, got one line with {rows[0].name!r}; write each "
            "class into a line of its own."
        )
    return assemble(rows, where)


def assemble(rows: Sequence[Row], where: str) -> Classes:
    """The classes of the rows: ordered by their numbers, with the prompts of each.

    Raises:
        DataError: there are none, a name or prompt is empty, or numbers and names disagree.
    """
    if not rows:
        raise DataError(f"{where}: expected at least one class, got a header alone.")
    rows = [row._replace(name=checked_name(row.name, f"{where}: line {row.line}")) for row in rows]
    groups: dict[object, list[Row]] = {}
    for i, row in enumerate(rows):
        key: object = i
        if row.number is not None:
            key = _number(row, where)
        elif row.prompt is not None:
            key = unicodedata.normalize("NFC", row.name)
        if (before := groups.setdefault(key, [])) and _differ(before[0].name, row.name):
            raise DataError(
                f"{where}: line {row.line}: expected {before[0].name!r} as the name of class "
                f"{key}, as in line {before[0].line}, got {row.name!r}."
            )
        before.append(row)
    if rows[0].number is not None:
        groups = dict(sorted(groups.items()))
        tell_numbers(list(groups), where)
    names = [group[0].name for group in groups.values()]
    if rows[0].prompt is None:
        return names
    for row in rows:
        if not row.prompt.strip():
            raise DataError(f"{where}: line {row.line}: expected a prompt, got an empty cell.")
    return with_prompts(names, [[row.prompt for row in group] for group in groups.values()], where)


def checked_name(name: str, where: str) -> str:
    """The name without outer blanks.

    Raises:
        DataError: it is empty or no readable text.
    """
    name = name.strip()
    if not name:
        raise DataError(f"{where}: expected the name of a class, got an empty one.")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise DataError(f"{where}: expected a name of letters, got {name!r}.")
    return name


def with_prompts(names: Sequence[str], prompts: Sequence[list[str]], where: str) -> Classes:
    """A mapping of the names, which are made distinct with a warning, to their prompts."""
    return dict(zip(told_apart(names, where, prompts=True), prompts, strict=True))


def tell_numbers(numbers: Sequence[int], where: str) -> None:
    """Warns where sorted numbers of classes are not their rows."""
    last = len(numbers) - 1
    if list(numbers) != list(range(last + 1)):
        log.warning(
            "%s: the classes' numbers, %d to %d, are not 0 to %d; the classes take the rows 0 to "
            "%d in the order of their numbers.", where, numbers[0], numbers[-1], last, last,
        )  # fmt: skip


def _split(text: str) -> list[str]:
    """Lines by line feeds and carriage returns only: names may hold other separators."""
    return re.split(r"\r\n|\r|\n", text)


def _cells(text: str, delimiter: str) -> Cells:
    # The separator line of spreadsheets ("sep=;") is no row.
    lines = io.StringIO(re.sub(r"\Asep=.\r?\n", "", text), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    return [(line, row) for line, row in rows if any(row)]


def _key(cell: str) -> str:
    return comparable(cell).replace(" ", "")


def _role(cell: str) -> str | None:
    return _ROLE.get(_key(cell))


def means_names(key: object) -> bool:
    """Whether a column or entry that is called so holds names of classes."""
    return isinstance(key, str) and _role(key) == "classname"


def _has_header(cells: Cells) -> bool:
    """Whether the first row names several columns, of which we know one, and holds no number."""
    if not cells or len(cells[0][1]) < 2:
        return False
    first = cells[0][1]
    known = sum(_role(cell) is not None for cell in first)
    return known > 0 and not any(_WHOLE.fullmatch(cell) for cell in first)


def _is_rectangle(cells: Cells) -> bool:
    return len({len(row) for _, row in cells}) == 1 and len(cells[0][1]) > 1


def _has_numbers(cells: Cells) -> bool:
    """Whether there are two columns, of which one alone holds numbers or WordNet ids."""
    return _is_rectangle(cells) and _number_column([row for _, row in cells]) is not None


def _number_column(rows: list[list[str]]) -> tuple[str, int] | None:
    """Of two columns the one of numbers or of WordNet ids: what it holds and which it is."""
    for kind, role in ((_WHOLE, "classidx"), (re.compile(r"n\d{8}"), "wnid")):
        fits = [all(len(row) == 2 and kind.fullmatch(row[i]) for row in rows) for i in (0, 1)]
        if fits[0] != fits[1]:
            return role, fits.index(True)
    return None


def _is_table(text: str, first: str, delimiter: str) -> bool:
    """Whether lines are a table: the first names columns, and that by more than chance."""
    try:
        header = _cells(first, delimiter)
        if not _has_header(header):
            return False
        known = sum(_role(cell) is not None for cell in header[0][1])
        return known > 1 or _is_rectangle(_cells(text, delimiter))
    except csv.Error:
        return False


def _read_cells(cells: Cells, where: str) -> Classes:
    first = cells[0][1]
    if _has_header(cells) or (len(first) == 1 and _key(first[0]) in _LONE_HEADERS):
        (_, header), *rows = cells
        columns = _columns(header, where)
    else:
        header, rows = first, cells
        columns = _columns_by_content(cells, where)
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{where}: line {line}: expected {len(header)} cells, got {len(row)}; a name or "
                "prompt with the separator in it needs quotes around it."
            )
    return assemble([_row(line, row, columns) for line, row in rows], where)


def _row(line: int, cells: list[str], columns: dict[str, int]) -> Row:
    def cell(role: str) -> str | None:
        return cells[columns[role]] if role in columns else None

    return Row(line, cell("classname") or "", cell("classidx"), cell("prompt"))


def _columns(header: list[str], where: str) -> dict[str, int]:
    """Which column has which role."""
    columns: dict[str, int] = {}
    for i, cell in enumerate(header):
        role = _role(cell)
        if role in columns:
            raise DataError(
                f"{where}: expected one column of the {role}, got {header[columns[role]]!r} and "
                f"{cell!r}."
            )
        if role is not None:
            columns[role] = i
    if "classname" not in columns:
        raise DataError(
            f"{where}: expected a column classname, and perhaps classidx and prompt, got the "
            f"columns {some(header)}."
        )
    return columns


def _columns_by_content(cells: Cells, where: str) -> dict[str, int]:
    """Without a header: names, or numbers or WordNet ids and names, in either order."""
    rows = [row for _, row in cells]
    if (found := _number_column(rows)) is not None:
        role, column = found
        return {role: column, "classname": 1 - column}
    if any(len(row) > 1 for row in rows):
        raise DataError(
            f"{where}: expected a header that names the columns (classname, and perhaps classidx "
            f"and prompt), or names alone, got {some(rows[0])} in the first row."
        )
    return {"classname": 0}


def _number(row: Row, where: str) -> int:
    if not _WHOLE.fullmatch(row.number) or not row.number.isascii() or len(row.number) > 9:
        raise DataError(
            f"{where}: line {row.line}: expected the number of a class, 0 or more, got "
            f"{row.number!r}."
        )
    return int(row.number)


def _differ(a: str, b: str) -> bool:
    return unicodedata.normalize("NFC", a) != unicodedata.normalize("NFC", b)


def _refuse_other_languages(lines: Sequence[tuple[int, str]], where: str) -> None:
    """What is no list of names, but a page or a program's own format."""
    for i, line in lines:
        found = None
        if line == "#" or re.match(r"#+\s|//|/\*", line):
            found = "a comment"
        elif line.startswith("<") and line.endswith(">"):
            found = "markup"
        elif line.endswith("{") or line == "}":
            found = "a bracket"
        elif re.match(r"[-*\u2022]\s", line):
            found = "a bullet"
        elif line.endswith((",", ";", ":")):
            found = f"{line[-1]!r} at the end"
        if found is not None:
            raise DataError(
                f"{where}: expected one class a line, got {found} in line {i}: {line!r}."
            )


def _refuse_header(first: str, where: str) -> None:
    """A first line that more likely names columns than a class."""
    words = [word for word in re.split(r"[\s:]+", first) if word]
    roles = {_role(word) for word in words}
    if _key(first) in _LONE_HEADERS or (len(roles) > 1 and None not in roles):
        raise DataError(
            f"{where}: expected one class a line, got {first!r} in line 1, which seems to be a "
            "header; take it out, or give a table with commas and the suffix .csv."
        )


def _without_wordnet_ids(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """ "n01440764 tench, Tinca tinca", as ImageNet's own lists have it, without the id."""
    found = [_WORDNET.fullmatch(line) for _, line in lines]
    if not all(found):
        return lines
    return [(i, match[2]) for (i, _), match in zip(lines, found, strict=True)]


def _numbered(lines: Sequence[tuple[int, str]], where: str) -> list[Row] | None:
    """Names with numbers before or behind them; None where they have none."""
    for pattern in (_NUMBERED, _NUMBERED_BEHIND):
        if (rows := _matched(pattern, lines)) is not None:
            commas = {line.count(",") for _, line in lines}
            behind_comma = pattern is _NUMBERED_BEHIND and any("," in row.name for row in rows)
            if behind_comma or (len(rows) > 1 and len(commas) == 1 and max(commas) > 1):
                raise DataError(
                    f"{where}: expected one class a line, got several columns in line "
                    f"{rows[0].line}; a table needs a header and the suffix .csv."
                )
            return rows
    for pattern in (_COUNTED, _COUNTED_BEHIND):
        rows = _matched(pattern, lines)
        # A name may begin or end with a number: only a count from 0 or 1 is none of its own.
        if rows is not None and len(rows) > 1:
            numbers = [_number(row, where) for row in rows]
            if numbers[0] in (0, 1) and numbers == sorted(set(numbers)):
                if numbers[-1] - numbers[0] == len(rows) - 1:
                    return rows
                raise DataError(
                    f"{where}: expected one class a line, got numbers that could be the classes' "
                    f"or belong to their names, such as {lines[-1][1]!r}; write "
                    f"'{numbers[-1]}, {rows[-1].name}', or names alone as JSON."
                )
    return None


def _matched(pattern: re.Pattern[str], lines: Sequence[tuple[int, str]]) -> list[Row] | None:
    found = [pattern.fullmatch(line) for _, line in lines]
    if not all(found):
        return None
    return [Row(i, m["name"], m["id"]) for (i, _), m in zip(lines, found, strict=True)]
