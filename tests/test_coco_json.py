"""Annotation files that are odd as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coco_files import annotated

from dive_fast import DataError
from dive_fast.data.coco import read_coco

TEXT = json.dumps(annotated(3))


def read(tmp_path: Path, content: bytes):
    path = tmp_path / "boxes.json"
    path.write_bytes(content)
    return read_coco(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    data = read(tmp_path, TEXT.replace('"cat"', '"k\u00e4tzchen"').encode(encoding))
    assert (data.names, len(data.images), data.problems) == (("k\u00e4tzchen",), 3, ())


def changed(old: str, new: str) -> str:
    """The first occurrence of what is there."""
    assert old in TEXT
    return TEXT.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a JSON file"),
        ("\0" * 10, "expected a JSON file"),
        (TEXT[:-30], "expected a JSON file"),
        (TEXT + "x", "expected a JSON file .Extra data"),
        ("null", "a JSON object, got a NoneType"),
        ("NaN", "a JSON object, got a float"),
        ("[" * 100_000, "one nested too deep"),
        (changed('"cat"', "[" * 100_000 + "]" * 100_000), "one nested too deep"),
        (changed('"cat"', "[" * 300 + "]" * 300), r"as id and a name, got .*\[\.\.\.\]"),
        (changed('"width": 640', '"width": ' + "9" * 5000), "value has 5000 digits"),
        (changed('{"images"', '{"images": [], "images"'), "key once in an object, got 'images' tw"),
        (
            changed('"category_id": 1', '"category_id": 2, "category_id": 1'),
            r"got 'category_id' twice \(2 and 1\)",
        ),
    ],
)
def test_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read(tmp_path, text.encode())
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)
    assert str(refused.value).endswith(".") and "set_int_max" not in str(refused.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a JSON file"):
        read(tmp_path, TEXT.replace('"cat"', '"\u00e9"').encode("latin-1"))


@pytest.mark.parametrize("number", ["1e400", "NaN", "-Infinity", "9" * 300, "1e300", "true"])
def test_numbers_that_are_no_coordinates(number: str, tmp_path: Path) -> None:
    data = read(tmp_path, changed('"bbox": [', f'"bbox": [{number}, 1, 2, 2], "x": [').encode())
    (problem,) = data.problems
    assert "expected a box of four numbers" in problem and len(problem) < 250
    assert [len(image.boxes) for image in data.images] == [0, 1, 1]


@pytest.mark.parametrize("number", ["1e400", "NaN", "-1", "true", '"9"'])
def test_numbers_that_are_no_areas(number: str, tmp_path: Path) -> None:
    data = read(tmp_path, changed('"bbox": [', f'"area": {number}, "bbox": [').encode())
    (problem,) = data.problems
    assert "expected an area of at least 0" in problem
    box = data.images[0].bbox[0]
    assert data.images[0].area.tolist() == [float(box[2] * box[3])]


def test_keys_that_mean_nothing_here_may_occur_twice(tmp_path: Path) -> None:
    text = changed('"category_id": 1', '"note": 1, "note": 2, "category_id": 1, "category_id": 1')
    assert read(tmp_path, text.encode()).problems == ()
