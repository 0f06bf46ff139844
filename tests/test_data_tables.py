"""Tables of paths and labels."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from pictures import noise_picture
from PIL import Image

from dive_fast.cli import main
from dive_fast.data import folder_classes, open_dataset, select
from dive_fast.errors import DataError, ImageError

CLASSES = ("tench, Tinca tinca", "goldfish", "great white shark")


def save_pictures(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3 + i, 4), (i, 0, 0)).save(folder / name)


def save_csv(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def save_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestCsv:
    def test_paths_labels_and_facts(self, tmp_path: Path) -> None:
        save_pictures(tmp_path, "a/1.png", "a/2.png", "3.png")
        path = save_csv(
            tmp_path / "table.csv",
            "path,label,site,year,dose,old,code,empty",
            "a/2.png,Tinca tinca,north,2019,0.5,true,007,",
            "a/1.png,2,,2020,1,False,008,",
            '"3.png",GOLDFISH,"a, b",2021,1e3,TRUE,x,',
        )
        dataset = open_dataset(path, CLASSES)
        assert list(dataset.ids) == ["a/2.png", "a/1.png", "3.png"]
        assert dataset.labels.tolist() == [0, 2, 1]
        assert [e.load().size for e in dataset.examples] == [(4, 4), (3, 4), (5, 4)]
        first, second, third = (e.facts for e in dataset.examples)
        assert first == {"site": "north", "year": 2019, "dose": 0.5, "old": True, "code": "007"}
        assert second == {"year": 2020, "dose": 1.0, "old": False, "code": "008"}
        assert third["site"] == "a, b" and third["dose"] == 1000.0
        assert [type(third[name]) for name in ("year", "dose", "old")] == [int, float, bool]
        assert dataset.name == "table.csv" and dataset.names == ("2", "GOLDFISH", "Tinca tinca")

    @pytest.mark.parametrize(
        "header, options",
        [
            ("File Name;class", ""),
            ("Image_Path\tTarget", ""),
            ("x|y|z", "?image=x&label=y"),
            ("a b,100%", "?image=a%20b&label=100%25"),
            ("label,path", "?label=path&image=label"),
        ],
    )
    def test_columns_and_separators(self, tmp_path: Path, header: str, options: str) -> None:
        save_pictures(tmp_path, "1.png")
        separator = next(s for s in ";\t|," if s in header)
        row = separator.join(["1.png", "goldfish", "7"][: header.count(separator) + 1])
        path = save_csv(tmp_path / "t.csv", header, row, "", encoding="utf-8-sig")
        (example,) = open_dataset(f"{path}{options}", CLASSES).examples
        assert (example.id, example.label) == ("1.png", 1)
        assert example.load().size == (3, 4)

    def test_likeliest_column_first(self, tmp_path: Path) -> None:
        path = save_csv(tmp_path / "t.tsv", "class\tfile\tlabel\timage", "cat\tx\t1\ty")
        (example,) = open_dataset(path, CLASSES).examples
        assert (example.id, example.label) == ("y", 1)
        assert example.facts == {"class": "cat", "file": "x"}

    def test_a_bad_picture_is_its_own_error(self, tmp_path: Path) -> None:
        (tmp_path / "bad.png").write_bytes(b"no image")
        path = save_csv(tmp_path / "t.csv", "file,label", "bad.png,0", "gone.png,1")
        for example in open_dataset(path, CLASSES).examples:
            with pytest.raises(ImageError, match=example.id):
                example.load()

    def test_absolute_paths(self, tmp_path: Path) -> None:
        save_pictures(tmp_path, "1.png")
        (tmp_path / "lists").mkdir()
        path = save_csv(tmp_path / "lists" / "t.csv", "file,label", f"{tmp_path / '1.png'},0")
        assert open_dataset(path, CLASSES).examples[0].load().size == (3, 4)

    def test_subsets_keep_their_facts_and_pickle(self, tmp_path: Path) -> None:
        lines = [f"{i}.png,{i % 3},{i * i}" for i in range(9)]
        path = save_csv(tmp_path / "t.csv", "file,label,square", *lines)
        some = pickle.loads(pickle.dumps(select(open_dataset(path, CLASSES), 4, 0)))
        assert [e.facts["square"] for e in some.examples] == [int(i[:-4]) ** 2 for i in some.ids]

    def test_as_spreadsheets_and_pandas_write_it(self, tmp_path: Path) -> None:
        """A mark, \\r\\n, cells of several lines, and a column without a name."""
        path = tmp_path / "t.csv"
        text = ',file,label,said\r\n0,a.png,0,"é, ""x""\r\ny"\r\n\r\n1,b.png,tench,z\r\n'
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        first, second = open_dataset(path, CLASSES).examples
        assert first.facts == {"said": 'é, "x"\r\ny'} and second.facts == {"said": "z"}
        with pytest.raises(DataError, match="line 6: expected 4 cells as in the header, got 1"):
            path.write_bytes(path.read_bytes() + b"c\r\n")
            open_dataset(path, CLASSES)

    def test_facts_are_read_when_they_are_wanted(self, tmp_path: Path) -> None:
        """However long the cells are, what a data set holds is an id, a label and an offset."""
        sizes = []
        for length in (10, 1000):
            lines = [f"{i:03d}.png,0,{'x' * length}{i}" for i in range(100)]
            path = save_csv(tmp_path / "t.csv", "file,label,caption", *lines)
            dataset = open_dataset(path, CLASSES)
            assert dataset.examples[42].facts == {"caption": f"{'x' * length}42"}
            sizes.append(len(pickle.dumps(dataset)))
        assert sizes[0] == sizes[1]

    def test_a_table_that_changes_meanwhile(self, tmp_path: Path) -> None:
        path = save_csv(tmp_path / "t.csv", "file,label,site", "a,0,x", "b,0,y")
        dataset = open_dataset(path, CLASSES)
        save_csv(path, "file,label,site", "longer,0,x", "b,0,y")
        with pytest.raises(DataError, match="t.csv: was changed while it was in use"):
            dataset.examples[1]
        path.unlink()
        with pytest.raises(DataError, match="t.csv: cannot be read as a table"):
            dataset.examples[0]

    def test_identity(self, tmp_path: Path) -> None:
        rows = ["path,label,site", "1.png,0,a", "2.png,1,b"]
        for place in ("one", "two"):
            save_pictures(tmp_path / place, "1.png", "2.png")
            save_csv(tmp_path / place / "t.csv", *rows)
        one, two = (
            open_dataset(tmp_path / p / "t.csv", CLASSES).identity() for p in ("one", "two")
        )
        assert one == two
        save_csv(tmp_path / "two" / "t.csv", *rows[:2], "2.png,2,b")
        assert open_dataset(tmp_path / "two" / "t.csv", CLASSES).identity() != one
        save_csv(tmp_path / "two" / "t.csv", *rows)
        noise_picture((64, 64), 9).save(tmp_path / "two" / "2.png")
        assert open_dataset(tmp_path / "two" / "t.csv", CLASSES).identity() != one

    def test_a_name_with_a_question_mark(self, tmp_path: Path) -> None:
        save_csv(tmp_path / "what?.csv", "file,label", "1.png,0")
        assert open_dataset(tmp_path / "what?.csv", CLASSES).name == "what?.csv"


class TestJsonl:
    def test_paths_labels_and_facts(self, tmp_path: Path) -> None:
        save_pictures(tmp_path, "1.png", "2.png")
        path = save_jsonl(
            tmp_path / "t.jsonl",
            {"image": "2.png", "label": 2, "site": "x", "n": 3, "box": [1, 2], "gone": None},
            {"label": "goldfish", "image": "1.png", "late": True, "share": float("inf")},
        )
        first, second = open_dataset(path, CLASSES).examples
        assert (first.id, first.label, first.facts) == ("2.png", 2, {"site": "x", "n": 3})
        assert (second.label, second.facts) == (1, {"late": True})
        assert first.load().size == (4, 4)

    def test_one_and_true_stay_apart(self, tmp_path: Path) -> None:
        rows = [{"image": f"{i}", "label": 0, "v": v} for i, v in enumerate((1, True, 1.0, "1"))]
        examples = open_dataset(save_jsonl(tmp_path / "t.jsonl", *rows), CLASSES).examples
        assert [type(e.facts["v"]) for e in examples] == [int, bool, float, str]

    def test_numbers_are_rows_and_texts_are_names(self, tmp_path: Path) -> None:
        rows = [{"image": "a", "label": 0}, {"image": "b", "label": "0"}]
        data = open_dataset(save_jsonl(tmp_path / "t.jsonl", *rows), ("1", "0"))
        assert data.labels.tolist() == [0, 1] and data.names is None


class TestClasses:
    def test_names(self, tmp_path: Path) -> None:
        path = save_csv(tmp_path / "t.csv", "file,label", "1,dog", "2,cat", "3,dog")
        assert folder_classes(path) == ["cat", "dog"]

    def test_numbers(self, tmp_path: Path) -> None:
        assert folder_classes(save_csv(tmp_path / "t.csv", "file,label", "1,0", "2,1")) is None
        path = save_csv(tmp_path / "u.csv", "file,label,name", "1,0,cat", "2,1,dog")
        assert folder_classes(f"{path}?label=name") == ["cat", "dog"]

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert folder_classes(tmp_path / "gone.csv") is None


BAD_CSV = {
    "empty": ([], "expected a table of images and labels, got an empty file"),
    "header": (["file,label"], "expected at least one image, got none"),
    "image": (["x,label,y", "1,2,3"], "called image, path or so .*'x', 'label', 'y'"),
    "label": (["file,x", "1,2"], r"'\?label=COLUMN'\), got the columns 'file', 'x'"),
    "cells": (["file,label", "1,2,3"], "line 2: expected 2 cells as in the header, got 3"),
    "twice": (["file,label", "a,0", "b,0", "a,1"], "each image once, got 'a' again in line 4"),
    "columns": (["file,label,file", "a,0,b"], "different names, got 'file' twice"),
    "path": (
        ["file,label", "a,0", ",1"],
        "line 3: expected the path of an image in 'file', got no",
    ),
    "class": (["file,label", "a,"], "line 2: expected the name or index of a class in 'label'"),
    "unknown": (["file,label", "a,dog", "b,3"], "does not know the classes 'dog', '3'"),
    "quote": (["file,label", 'a,"0'], "cannot be read as a table"),
}


class TestRefused:
    @pytest.mark.parametrize("lines, got", BAD_CSV.values(), ids=BAD_CSV)
    def test_csv(self, tmp_path: Path, lines: list[str], got: str) -> None:
        path = tmp_path / "t.csv"
        path.write_text("\n".join(lines))
        with pytest.raises(DataError, match=f"t.csv: .*{got}"):
            open_dataset(path, CLASSES)

    @pytest.mark.parametrize(
        "text, got",
        [
            ("{", "line 1: expected JSON"),
            ("\n[1, 2]", r"line 2: expected an object .* got \[1, 2\]"),
            ('{"image": "a", "label": 1.5}', "line 1: .* got 1.5"),
            ('{"image": "a", "label": true}', "line 1: .* got True"),
            ('{"image": "a", "label": 3}', "does not know the classes 3: .* or indices 0 to 2"),
            ('{"image": "a", "label": -1}', "does not know the classes -1"),
            ('{"image": "a", "label": 0}\n{"image": "b"}', "line 2: .* in 'label', got none"),
            ('{"image": {"a": 1}, "label": 0}', "line 1: expected the path of an image"),
            ("", "empty file"),
        ],
    )
    def test_jsonl(self, tmp_path: Path, text: str, got: str) -> None:
        (tmp_path / "t.jsonl").write_text(text)
        with pytest.raises(DataError, match=got):
            open_dataset(tmp_path / "t.jsonl", CLASSES)

    @pytest.mark.parametrize(
        "options, got",
        [
            ("?image=x", "expected a column 'x', got the columns 'file', 'label'"),
            ("?img=file", "expected the options image, label, got 'img'"),
            ("?image=", "expected a value of image, got none"),
            ("?label=a&label=b", "expected each option once"),
            ("?", "nothing is there"),
        ],
    )
    def test_options(self, tmp_path: Path, options: str, got: str) -> None:
        path = save_csv(tmp_path / "t.csv", "file,label", "1,0")
        with pytest.raises(DataError, match=got):
            open_dataset(f"{path}{options}", CLASSES)

    def test_other_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes("file,label\né,0".encode("latin-1"))
        with pytest.raises(DataError, match="expected UTF-8 text"):
            open_dataset(tmp_path / "t.csv", CLASSES)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nothing is there"):
            open_dataset(f"{tmp_path}/t.csv?image=a", CLASSES)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A .jsonl is for classifiers, where a .json is for detectors."""
    digits = np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
    for i, pixels in enumerate(digits):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    path = save_jsonl(
        tmp_path / "t.jsonl", {"file": "0.png", "label": "seven"}, {"file": "1.png", "label": 2}
    )
    out = tmp_path / "run"
    status = main(
        ["evaluate", "--data", str(path), "--out", str(out), "--probes", "4", "--device", "cpu"]
    )
    assert status == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {r["id"]: r["truth"] for r in records} == {"0.png": 7, "1.png": 2}
