"""Lists of classes in files: plain lines, tables, JSON and YAML, each read for what it is.

``read_classes`` says which forms there are. What is none of them is refused, so that no header, row
or number becomes a class.
"""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from dive_fast.data.class_tables import Classes, read_lines, read_table
from dive_fast.data.class_trees import read_json_classes, read_yaml_classes
from dive_fast.errors import DataError

MAX_BYTES = 64 * 2**20
# The longer ones first: UTF-32's begins as UTF-16's does.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXT = frozenset(map(chr, range(32))) - frozenset("\t\n\r\f")


def read_classes(path: str | os.PathLike[str]) -> Classes:
    """The classes that a file lists, as text-conditional models take them.

    By the file's suffix:

    - ``.csv``, ``.tsv``: a table with a header, of which the columns classname, classidx and
      prompt count (also called name or label, id or index, and so on); classes are ordered by
      classidx, and the prompts of one class belong together. Commas, semicolons or tabs lie
      between. Without a header: names, or numbers and names.
    - ``.json``: a list of names; an object of numbers to names (also ``id2label`` of a
      configuration, or ImageNet's class index), of names to numbers, or of names to their prompts;
      or COCO's categories.
    - ``.yaml``, ``.yml``: the same, or the ``names`` of a YOLO data set.
    - anything else: one name a line. Numbers and WordNet ids before the names are not part of them;
      a table, JSON or YAML is known by its first line.

    Text is UTF-8, or UTF-16 with a byte order mark. Blanks around names are dropped.

    Returns:
        The names, in the order of their numbers where they have such; equal names stay equal. A
        mapping of names to prompts where there are prompts; its names are made distinct.

    Raises:
        DataError: there is no such file, or it is not such a list; the sentence says the line.
    """
    path = Path(path)
    text, where = _text(path), str(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return read_table(text, where)
    if suffix in (".tsv", ".tab"):
        return read_table(text, where, "\t")
    if suffix == ".json":
        return read_json_classes(text, where)
    if suffix in (".yaml", ".yml") or text.lstrip()[0] in "{[":
        return read_yaml_classes(text, where)
    return read_lines(text, where)


def _text(path: Path) -> str:
    """The file's text, which is not blank."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: expected a file of classes, got a folder or device.")
        if status.st_size > MAX_BYTES:
            raise DataError(
                f"{path}: expected a list of classes of at most {MAX_BYTES:,} bytes, got "
                f"{status.st_size:,}."
            )
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file of classes, but nothing is there.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read as a list of classes: {reason}.") from error
    text = _decoded(content, path)
    if not text.strip():
        raise DataError(f"{path}: expected at least one class, got an empty file.")
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: expected a list of classes, got a Git LFS pointer to one.")
    return text


def _decoded(content: bytes, path: Path) -> str:
    encoding = next((e for mark, e in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} cannot be read as a list of classes: expected {encoding.upper()[:6]} text, "
            f"got other bytes in line {line}; save it as UTF-8."
        ) from error
    if not _NO_TEXT.isdisjoint(text):
        raise DataError(
            f"{path} cannot be read as a list of classes: expected text, got a binary file, or "
            "UTF-16 without a byte order mark."
        )
    return text
