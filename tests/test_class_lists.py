"""Lists of classes in files: every form for what it is, or one sentence."""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from pathlib import Path

import pytest
import yaml

from dive_fast.data import class_lists, read_classes
from dive_fast.errors import DataError

NAMES = ["tench", "goldfish", "great white shark, white shark"]
PROMPTS = {
    "tench": ["a photo of a tench.", "a tench, in water"],
    "goldfish": ["a photo of a goldfish."],
}
HEADER = "prompt,classname,classidx"


def read(folder: Path, name: str, content: str | bytes) -> object:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_classes(path)


# -- what is read ----------------------------------------------------------------------------------

LINES = {
    "plain": "tench\ngoldfish\ngreat white shark, white shark\n",
    "windows": "tench\r\n\r\n  goldfish \r\ngreat white shark, white shark",
    "old mac": "tench\rgoldfish\rgreat white shark, white shark\r",
    "header": "classname\ntench\ngoldfish\ngreat white shark, white shark\n",
    "one quote": "'tench'\n'goldfish'\n'great white shark, white shark'\n",
    "quoted": '"tench"\n"goldfish"\n"great white shark, white shark"\n',
    "id, name": "0,tench\n1,goldfish\n2,great white shark, white shark\n",
    "id: name": "0: tench\n1: goldfish\n2: great white shark, white shark\n",
    "out of order": "2;great white shark, white shark\n0;tench\n1;goldfish\n",
    "counted": "0 tench\n1 goldfish\n2 great white shark, white shark\n",
    "counted from 1": "1. tench\n2. goldfish\n3. great white shark, white shark\n",
    "counted behind": "tench 0\ngoldfish 1\ngreat white shark, white shark 2\n",
    "WordNet": "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark, white shark\n",
    "WordNet, count": "n01440764 1 tench\nn01443537 2 goldfish\nn01484850 3 great white shark, "
    "white shark\n",
    "header of a table": 'classname,classidx\ngoldfish,1\ntench,0\n"great white shark, white shark"'
    ",2\n",
    "one known column": "wnid;classname\nn1;tench\nn2;goldfish\nn3;great white shark, white shark",
    "a dictionary": "{0: 'tench',\n 1: 'goldfish',\n 2: 'great white shark, white shark'}",
    "a list": '["tench", "goldfish",\n"great white shark, white shark"]',
}


@pytest.mark.parametrize("form", LINES)
@pytest.mark.parametrize("name", ["names.txt", "coco.names", "names"])
def test_lines(form: str, name: str, tmp_path: Path) -> None:
    assert read(tmp_path, name, LINES[form]) == NAMES


@pytest.mark.parametrize(
    "text",
    ["2 door car\n4 door car\n", "0\n1\n2\n", "Boeing 707\nBoeing 727\n", "fox, red\nfox, grey\n",
     "text\ntitle\nlist\n", "C#\n#hashtag\n", "{} dog\ncat\n".replace("{}", "x{}")],
)  # fmt: skip
def test_lines_that_are_names_as_they_stand(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, "names.txt", text) == text.splitlines()


BYTES = {
    "UTF-8": "café\nthé".encode(),
    "UTF-8 with mark": codecs.BOM_UTF8 + "café\nthé".encode(),
    "UTF-16": "café\nthé".encode("utf-16"),
    "UTF-16 BE": codecs.BOM_UTF16_BE + "café\nthé".encode("utf-16-be"),
    "UTF-32": "café\nthé".encode("utf-32"),
}


@pytest.mark.parametrize("encoding", BYTES)
@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv"])
def test_encodings(encoding: str, suffix: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"a.{suffix}", BYTES[encoding]) == ["café", "thé"]


TABLES = {
    "names alone": 'tench\ngoldfish\n"great white shark, white shark"\n',
    "one column": 'label\ntench\ngoldfish\n"great white shark, white shark"\n',
    "header": 'classidx,classname\n2,"great white shark, white shark"\n0,tench\n1,goldfish\n',
    "other words": 'Name,Class ID\ntench,0\ngoldfish,1\n"great white shark, white shark",2\n',
    "repeated rows": f'{HEADER[7:]}\ntench,0\ntench,0\ngoldfish,1\n"{NAMES[2]}",2\n',
    "semicolons": "classidx;classname;n\n0;tench;5\n1;goldfish;6\n2;" + NAMES[2] + ";7",
    "tabs": "classname\tclassidx\ntench\t0\ngoldfish\t1\ngreat white shark, white shark\t2\n",
    "no header": '0,tench\n1,goldfish\n2,"great white shark, white shark"\n',
    "no header, reversed": 'tench,0\ngoldfish,1\n"great white shark, white shark",2\n',
    "no header, semicolons": "0;tench\n1;goldfish\n2;great white shark, white shark\n",
    "WordNet": 'n01440764,tench\nn01443537,goldfish\nn01484850,"great white shark, white shark"\n',
    "pandas": f',classname,classidx\n0,tench,0\n1,goldfish,1\n2,"{NAMES[2]}",2\n',
    "spreadsheet": 'sep=;\r\nclassname;classidx\r\ntench;0\r\ngoldfish;1\r\n"great white shark, '
    'white shark";2\r\n;\r\n',
}


@pytest.mark.parametrize("form", TABLES)
def test_tables_of_names(form: str, tmp_path: Path, caplog) -> None:
    assert read(tmp_path, "a.csv", TABLES[form]) == NAMES
    assert not caplog.messages


@pytest.mark.parametrize("delimiter", ",;\t|")
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a"])
def test_prompts_as_published(delimiter: str, name: str, tmp_path: Path) -> None:
    """Several rows per class, in the order of classidx."""
    rows = [
        ["a photo of a goldfish.", "goldfish", "1"],
        ["a photo of a tench.", "tench", "0"],
        [f'"{PROMPTS["tench"][1]}"', "tench", "0"],
    ]
    text = "\r\n".join(delimiter.join(row) for row in [HEADER.split(","), *rows])
    found = read(tmp_path, name, text)
    assert found == PROMPTS and list(found) == ["tench", "goldfish"]


def test_prompts_without_numbers_keep_their_order(tmp_path: Path) -> None:
    text = "classname,prompt\ncat,a cat\ndog,a dog\ncat,my cat\n"
    found = read(tmp_path, "a.csv", text)
    assert list(found.items()) == [("cat", ["a cat", "my cat"]), ("dog", ["a dog"])]


def test_equal_names_of_different_classes_get_their_rows(tmp_path: Path, caplog) -> None:
    """As ImageNet's missile, in the published file of prompts."""
    text = f"{HEADER}\na missile.,missile,0\na cat.,cat,1\na missile.,missile,2\n"
    found = read(tmp_path, "a.csv", text)
    assert found == {
        "missile (0)": ["a missile."],
        "cat": ["a cat."],
        "missile (2)": ["a missile."],
    }
    (line,) = caplog.messages
    assert "'missile (0)', 'missile (2)'" in line
    # Names alone stay as they are: whoever makes prompts of them needs them so.
    text = "classname,classidx\nmissile,0\ncat,1\nmissile,2\n"
    assert read(tmp_path, "a.csv", text) == ["missile", "cat", "missile"]


@pytest.mark.parametrize("numbers", [(1, 2), (0, 5), (7, 90)])
def test_numbers_that_are_no_rows_are_told(
    numbers: tuple[int, int], tmp_path: Path, caplog
) -> None:
    first, last = numbers
    forms = {
        "a.csv": f"classname,classidx\ndog,{last}\ncat,{first}\n",
        "a.txt": f"{first}: cat\n{last}: dog\n",
        "a.json": json.dumps({str(last): "dog", str(first): "cat"}),
        "a.yaml": f"{last}: dog\n{first}: cat\n",
        "b.json": json.dumps([{"id": last, "name": "dog"}, {"id": first, "name": "cat"}]),
    }
    for name, text in forms.items():
        caplog.clear()
        assert read(tmp_path, name, text) == ["cat", "dog"]
        (line,) = caplog.messages
        assert f"numbers, {first} to {last}, are not 0 to 1" in line


TREES = {
    "list": NAMES,
    "numbers": {"0": "tench", "2": NAMES[2], "1": "goldfish"},
    "class index": {str(i): [f"n0000000{i}", name] for i, name in enumerate(NAMES)},
    "configuration": {"model_type": "dit", "id2label": dict(enumerate(NAMES)), "label2id": {}},
    "numbers of names": {name: i for i, name in enumerate(NAMES)},
    "categories": {"images": [], "categories": [{"id": i, "name": n} for i, n in enumerate(NAMES)]},
    "categories without ids": [{"name": name} for name in NAMES],
    "classes": {"classes": NAMES},
    "names": {"names": NAMES},
    "labels": {"Class_Names": NAMES},
    "YOLO": {"path": "data", "train": "images", "nc": 3, "names": NAMES},
    "YOLO's numbers": {"train": "images", "names": dict(enumerate(NAMES))},
}


@pytest.mark.parametrize("form", TREES)
def test_trees_of_names(form: str, tmp_path: Path) -> None:
    assert read(tmp_path, "a.json", json.dumps(TREES[form])) == NAMES
    assert read(tmp_path, "a.json", codecs.BOM_UTF8 + json.dumps(TREES[form]).encode()) == NAMES
    assert read(tmp_path, "a.yaml", yaml.safe_dump(TREES[form])) == NAMES
    assert read(tmp_path, "a.YML", yaml.safe_dump(TREES[form], default_flow_style=True)) == NAMES


@pytest.mark.parametrize("name", ["tench", "n01440764"])
def test_trees_of_prompts(name: str, tmp_path: Path) -> None:
    tree = {name: ["a tench", "a fish"], "dog": "my dog"}
    expected = {name: ["a tench", "a fish"], "dog": ["my dog"]}
    assert read(tmp_path, "a.json", json.dumps(tree)) == expected
    assert read(tmp_path, "a.yaml", yaml.safe_dump(tree)) == expected
    assert read(tmp_path, "a.json", json.dumps({"classes": tree})) == expected


# -- what is refused -------------------------------------------------------------------------------

BAD = {
    "empty": ("a.txt", "", "expected at least one class, got an empty file"),
    "blank": ("a.csv", " \n\n", "expected at least one class, got an empty file"),
    "only a mark": ("a.json", codecs.BOM_UTF8, "got an empty file"),
    "latin-1": ("a.txt", "cat\ncafé".encode("latin-1"), "expected UTF-8 text, .* in line 2; save"),
    "binary": ("a.txt", b"\x89PNG\r\n\x1a\n\0\0", "cannot be read as a list of classes"),
    "UTF-16 without mark": ("a.txt", "cat".encode("utf-16-le"), "without a byte order mark"),
    "half UTF-16": ("a.txt", codecs.BOM_UTF16_LE + b"a", "expected UTF-16 text"),
    "pointer": ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS pointer"),
    "web page": ("a.txt", "<!DOCTYPE html>\n<html>\n", "got markup in line 1"),
    "comment": ("a.txt", "# my classes\ncat\n", "got a comment in line 1: '# my classes'"),
    "bullets": ("a.txt", "- cat\n- dog\n", "got a bullet in line 1"),
    "label map": ("a.pbtxt", "item {\n name: 'cat'\n}", "got a bracket in line 1"),
    "part of a list": ("a.txt", '"cat",\n"dog"', "got ',' at the end in line 1"),
    "key": ("a.txt", "names:\ncat\n", "got ':' at the end in line 1"),
    "one line": ("a.txt", "cat,dog,fox\n", "got one line with 'cat,dog,fox'"),
    "columns in lines": ("a.txt", "cat\tfeline\ndog\tcanine\n", "several columns in line 1"),
    "bars in a line": ("a.txt", "cat|dog|fox\n", "got one line with"),
    "lone header": ("a.txt", "label\ncat\n", "'label' in line 1, which seems to be a header"),
    "header of blanks": ("a.txt", "id name\n0 cat\n1 dog", "'id name' .* seems to be a header"),
    "header of colons": ("a.txt", "index: name\n0: cat\n1: dog", "seems to be a header"),
    "count with gaps": ("a.txt", "0 cat\n1 dog\n3 fox", "such as '3 fox'; write '3, fox'"),
    "count behind with gaps": ("a.txt", "cat 1\ndog 5\n", "such as 'dog 5'; write '5, dog'"),
    "prompts without header": ("a.txt", "a cat,cat,0\na dog,dog,1\n", "several columns in line 1"),
    "three columns": ("a.txt", "0,cat,feline\n1,dog,canine\n", "several columns in line 1"),
    "numbers disagree": ("a.txt", "0,cat\n0,dog\n", "line 2: expected 'cat' as the name"),
    "header alone": ("a.csv", HEADER, "at least one class, got a header alone"),
    "header alone in lines": ("a.txt", HEADER, "at least one class, got a header alone"),
    "no names": ("a.csv", "prompt,classidx\na,0\n", "a column classname, .* 'prompt', 'classidx'"),
    "prompts alone": ("a.csv", "prompt\na cat\n", "a column classname, .* the columns 'prompt'"),
    "two names": ("a.csv", "classname,label\na,0\n", "one column of the classname, got"),
    "same column twice": ("a.csv", "classname,classname\na,b\n", "one column of the classname"),
    "short row": ("a.csv", f"{HEADER}\na,b\n", "line 2: expected 3 cells, got 2"),
    "unquoted comma": ("a.csv", f"{HEADER}\na cat, big,cat,0\n", "line 2: expected 3 cells, got 4"),
    "no header": ("a.csv", "a cat,cat,0\na dog,dog,1\n", "header that names the columns"),
    "names with commas": ("a.csv", "tench, Tinca\nshark, white\n", "header that names the columns"),
    "ragged": ("a.csv", "cat\ntench, Tinca tinca\n", "header that names|expected 1 cells"),
    "words as numbers": ("a.csv", "classname,classidx\ncat,one\n", "line 2: .* number .*'one'"),
    "fractions": ("a.csv", "classname,classidx\ncat,0.0\n", "line 2: expected the number .* '0.0'"),
    "negative": ("a.csv", "classname,classidx\ncat,-1\n", "line 2: expected the number .* '-1'"),
    "no number": ("a.csv", "classname,classidx\ncat,\n", "line 2: expected the number .* ''"),
    "two names of a number": (
        "a.csv", "classname,classidx\ncat,0\ndog,0\n", "line 3: expected 'cat' .* as in line 2",
    ),
    "empty name": ("a.csv", "classname,classidx\n ,0\n", "line 2: expected the name of a class"),
    "empty prompt": ("a.csv", f"{HEADER}\n,cat,0\n", "line 2: expected a prompt, got an"),
    "open quote": ("a.csv", f'{HEADER}\n"a cat,cat,0\n', "cannot be read as a table"),
    "broken JSON": ("a.json", '["cat"', "cannot be read as JSON"),
    "lines in JSON": ("a.json", "cat\ndog", "cannot be read as JSON"),
    "deep": ("a.json", "[" * 100_000, "nested too deeply"),
    "deep YAML": ("a.yaml", "[" * 3_000, "cannot be read as YAML"),
    "key twice": ("a.json", '{"0": "cat", "0": "dog"}', "the key '0' stands there twice"),
    "YAML key twice": ("a.yaml", "0: cat\n0: dog\n", "the key 0 stands there twice"),
    "number twice": ("a.json", '{"0": "cat", "00": "dog"}', "one name of class 0, got 'cat'"),
    "empty list": ("a.json", "[]", "got an empty one"),
    "empty mapping": ("a.yaml", "{}", "got an empty one"),
    "text": ("a.json", '"cat"', "expected a list of names, or a mapping .* got 'cat'"),
    "plain YAML": ("a.yaml", "cat\ndog\n", "expected a list of names, .* got 'cat dog'"),
    "a list as a name": ("a.json", '["cat", ["dog"]]', r"entry 1: .* as text, got \['dog'\]"),
    "a number as a name": ("a.json", '["cat", 3]', "entry 1: .* as text, got 3"),
    "null as a name": ("a.json", '{"0": null}', "class 0: .* as text, got None"),
    "a blank name": ("a.json", '["cat", " "]', "entry 1: .* got an empty one"),
    "prompts of numbers": ("a.json", '{"0": ["a cat", "my cat"]}', "class 0: .* as text, got"),
    "no as a name": ("a.yaml", "- yes\n- no\n", "got True; YAML reads no, on, null and 1 as"),
    "1 as a name": ("a.yaml", "- 1\n- 2\n", "as text, got 1; YAML reads"),
    "no as a key": ("a.yaml", "no: a photo\nyes: b\n", "expected names as keys, .* got False"),
    "mixed keys": ("a.json", '{"cat": "a", "1": "b"}', "expected names as keys, .* got '1'"),
    "no prompts": ("a.json", '{"cat": []}', r"for the class 'cat', got \[\]"),
    "a number as a prompt": ("a.json", '{"cat": ["a", 3]}', "as text for the class 'cat', got 3"),
    "numbers in quotes": ("a.json", '{"cat": "0", "dog": "1"}', "could be either"),
    "YOLO's count": ("a.yaml", "nc: 3\nnames: [cat, dog]\n", "expected nc 3 names, got 2"),
    "others beside classes": ("a.json", '{"classes": ["a"], "templates": ["{}"]}', "classes alone"),
    "category without name": ("a.json", '[{"id": 1}]', "entry 0: expected an entry with a name"),
    "category id": ("a.json", '[{"id": "x", "name": "a"}]', "entry 0: expected an id"),
    "YAML tag": ("a.yaml", "!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    "broken YAML": ("a.yaml", "names: [cat\n", "cannot be read as YAML: .* in line 2"),
    "two documents": ("a.yaml", "- cat\n---\n- dog\n", "cannot be read as YAML"),
    "bomb": (
        "a.yaml",
        "a: &a [x, x]\n" + "".join(f"{q}: &{q} [{', '.join(f'*{p}' for _ in range(9))}]\n"
                                  for p, q in zip("abcdefgh", "bcdefghi", strict=True)),
        "prompts as text for the class 'b'",
    ),
    "half a character": ("a.json", '["\\udcff"]', "expected a name of letters"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_refused(kind: str, tmp_path: Path) -> None:
    name, content, message = BAD[kind]
    with pytest.raises(DataError, match=message) as refused:
        read(tmp_path, name, content)
    sentence = str(refused.value)
    assert sentence.startswith(str(tmp_path / name)) and "\n" not in sentence
    assert sentence.endswith(".") and len(sentence) < 600


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="but nothing is there"):
        read_classes(tmp_path / "missing.csv")
    with pytest.raises(DataError, match="got a folder or device"):
        read_classes(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_classes("a\0b.csv")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="got a folder or device"):
        read_classes(tmp_path / "pipe")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(class_lists.MAX_BYTES + 1)
    with pytest.raises(DataError, match="at most 67,108,864 bytes, got 67,108,865"):
        read_classes(tmp_path / "a.txt")


def test_two_forms_of_one_letter_are_one_name(tmp_path: Path) -> None:
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    found = read(tmp_path, "a.csv", f"classname,classidx,prompt\n{one},0,a\n{two},0,b\n")
    assert found == {one: ["a", "b"]}
