"""Tasks as files: what a specification says, which items come of it, and where images are found."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from task_inputs import PAIR, TWICE, write_pair_task, write_picture, write_twice_task

from dive_fast import DataError, ImageError
from dive_fast.data.tasks import TaskSpec, open_task, read_task, task_names
from dive_fast.data.tasks.store import Store


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, Path("top", file.relative_to(folder)))
    return path


# -- specifications --------------------------------------------------------------------------------


def test_those_that_come_with_the_package() -> None:
    assert {"sugarcrepe", "winoground"} <= set(task_names())
    for name in task_names():
        spec = read_task(name)
        assert spec.name == name
        assert spec.citation and spec.licence and spec.source and spec.about
    kinds = [category for _, category in read_task("sugarcrepe").items]
    assert kinds == [
        "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj",
    ]  # fmt: skip


def test_yaml_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("name: pair\nimages: image\ntexts: [right, wrong]\nitems: items.json\n")
    assert read_task(path) == TaskSpec.from_dict(PAIR, "here")
    assert read_task(path).images == ("image",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": None}, "'texts' to be a text, got None"),
        ({"texts": []}, "'texts' to be different fields, got "),
        ({"texts": ["right", "right"]}, "different fields"),
        ({"images": 3}, "'images' to be a text, got 3"),
        ({"items": {}}, "'items'"),
        ({"items": {"a": ["b"]}}, "'items' to be a text"),
        ({"captions": "x"}, "has the keys name, images.* got 'captions'"),
        ({"items": {"a": "a.json"}, "category": "kind"}, "from a field, got both"),
        ({"licence": 7}, "'licence' to be a text, got 7"),
    ],
    ids=str,
)
def test_a_specification_that_is_none(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TaskSpec.from_dict(PAIR | change, "here")


@pytest.mark.parametrize("key", ["name", "images", "texts", "items"])
def test_a_key_is_missing(key: str) -> None:
    with pytest.raises(DataError, match=f"with '{key}', got one without"):
        TaskSpec.from_dict({k: v for k, v in PAIR.items() if k != key}, "here")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "a task of sugarcrepe, winoground, or a file .* got '.*nowhere'"),
        ("no.json", None, "cannot be read .No such file"),
        ("t.json", b"[1, 2]", "as an object of keys, got .1, 2."),
        ("t.json", b"{", "cannot be read as JSON"),
        ("t.json", b'{"name": "a", "name": "b"}', "stands there twice"),
        ("t.yaml", b"a: [", "cannot be read as YAML"),
        ("t.json", b"\xff\xfe\xff", "cannot be read as text"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_file_that_says_none(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_task(path)


def test_what_is_no_name() -> None:
    with pytest.raises(DataError, match="the name of a task or a file, got 3"):
        read_task(3)


# -- items -----------------------------------------------------------------------------------------


def test_items_of_a_folder_and_of_an_archive(tmp_path: Path) -> None:
    spec = write_pair_task(tmp_path / "data", 3)
    here = open_task(spec, tmp_path / "data")
    assert [item.id for item in here.items] == ["k0", "k1", "k2"]
    assert here.items[1].texts == ("a cat 1", "a dog 1")
    assert here.items[1].images == ("1.png",) and here.items[1].category is None
    packed = open_task(spec, zipped(tmp_path / "data", tmp_path / "data.zip"))
    assert packed.items == here.items
    assert [digest for _, digest in packed.files] == [digest for _, digest in here.files]
    for name in ("2.png", "images/2.png", "2.webp"):  # the suffix may be another
        assert packed.pictures.image(name).size == here.pictures.image(name).size == (20, 18)


def test_two_images_and_two_texts(tmp_path: Path) -> None:
    data = open_task(write_twice_task(tmp_path), tmp_path)
    assert [(item.id, item.category) for item in data.items] == [
        ("0", "even"), ("1", "odd"), ("2", "even"),
    ]  # fmt: skip
    assert data.items[2].images == ("first-2", "second-2")
    assert data.pictures.image("first-2").size == (20, 18)


def test_tables_lists_and_fields_of_several_values(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "right": "x", "wrong": "y"}, {"image": "b", "right": 1, "wrong": 2}]
    (tmp_path / "items.csv").write_text("image,right,wrong\na.png,x,y\nb,1,2\n")
    (tmp_path / "items.tsv").write_text("image\tright\twrong\na.png\tx\ty\nb\t1\t2\n")
    (tmp_path / "items.json").write_text(json.dumps(rows))
    (tmp_path / "items.yml").write_text(json.dumps(rows))
    (tmp_path / "items.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    found = []
    for suffix in ("csv", "tsv", "json", "yml", "jsonl"):
        spec = TaskSpec.from_dict(PAIR | {"items": f"items.{suffix}"}, "here")
        found.append(open_task(spec, tmp_path).items)
    assert all(items == found[0] for items in found)
    assert [(item.id, item.texts) for item in found[0]] == [("0", ("x", "y")), ("1", ("1", "2"))]
    (tmp_path / "many.json").write_text(json.dumps([{"image": "a", "texts": ["x", "y", "z"]}]))
    spec = TaskSpec.from_dict(PAIR | {"items": "many.json", "texts": "texts"}, "here")
    assert open_task(spec, tmp_path).items[0].texts == ("x", "y", "z")


def test_files_by_category(tmp_path: Path) -> None:
    row = {"image": "a", "right": "x", "wrong": "y"}
    for name in ("swap", "add"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"0": row, "7": row}))
    spec = TaskSpec.from_dict(PAIR | {"items": {"b": "swap.json", "a": "add.json"}}, "here")
    items = open_task(spec, tmp_path).items
    assert [(i.id, i.category) for i in items] == [
        ("b/0", "b"), ("b/7", "b"), ("a/0", "a"), ("a/7", "a"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"0": {"image": "a"', "cannot be read as JSON"),
        (b"\xff\xff", "cannot be read as text"),
        (b"3", "a list or object of items, got 3"),
        (b"[]", "at least one item, got none"),
        (b"[3]", "item 0: expected an object of fields, got 3"),
        (b'[{"image": "a", "right": "x"}]', "item 0: expected a field 'wrong', got image, right"),
        (b'[{"image": "a", "right": "x", "wrong": null}]', "'wrong' to be a text, got None"),
        (b'[{"image": "a", "right": "x", "wrong": true}]', "'wrong' to be a text, got True"),
        (b'[{"image": "a", "right": "x", "wrong": " "}]', "'wrong' to be a text"),
        (b'[{"image": "a", "right": "x", "wrong": "x"}]', "each text once"),
        (b'[{"image": "a", "right": ["x", 3.5, null], "wrong": "y"}]', "'2' to be a text"),
        (b'[{"image": [], "right": [], "wrong": ["y"]}]', "one of them, got 0 and 1"),
        (b'[{"image": "a", "right": [], "wrong": ["y"]}]', "one of them, got 1 and 1"),
    ],
    ids=str,
)
def test_damaged_items(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "items.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_task(TaskSpec.from_dict(PAIR, "here"), tmp_path)


def test_a_line_that_is_no_json_and_an_id_twice(tmp_path: Path) -> None:
    spec = read_task(write_twice_task(tmp_path))
    lines = (tmp_path / "items.jsonl").read_text()
    (tmp_path / "items.jsonl").write_text(lines + "{torn\n")
    with pytest.raises(DataError, match="line 4 cannot be read as JSON"):
        open_task(spec, tmp_path)
    (tmp_path / "items.jsonl").write_text(lines + lines)
    with pytest.raises(DataError, match="each id once, got '0' twice"):
        open_task(spec, tmp_path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    spec = write_pair_task(tmp_path / "data", 1)
    with pytest.raises(DataError, match="folder or a .zip file, but nothing is there"):
        open_task(spec, tmp_path / "no.zip")
    with pytest.raises(DataError, match="got neither"):
        open_task(spec, spec)
    with pytest.raises(DataError, match="expected a folder or a .zip file, got 3"):
        open_task(spec, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no file 'items.json'"):
        open_task(spec, tmp_path / "empty")
    for name in ("a", "b"):
        (tmp_path / "empty" / name).mkdir()
        (tmp_path / "empty" / name / "items.json").write_text("{}")
    with pytest.raises(DataError, match="may be 'a/items.json', 'b/items.json': name its folder"):
        open_task(spec, tmp_path / "empty")
    spec = TaskSpec.from_dict(TWICE | {"items": "pair.parquet"}, "here")
    (tmp_path / "data" / "pair.parquet").touch()
    with pytest.raises(DataError, match="expected items in a file of .json"):
        open_task(spec, tmp_path / "data")


# -- where files lie -------------------------------------------------------------------------------


def test_nothing_outside_is_read(tmp_path: Path) -> None:
    write_picture(tmp_path / "outside.png", 0)
    (tmp_path / "inside").mkdir()
    store = Store(tmp_path / "inside")
    for name in ("../outside.png", str(tmp_path / "outside.png"), "outside.png"):
        with pytest.raises(ImageError, match="has no file"):
            store.image(name)


def test_images_that_may_be_several(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "b/2.png", "b/2.jpg"):
        write_picture(tmp_path / name, 0)
    store = Store(tmp_path)
    assert store.find("a/1.png") == "a/1.png"
    assert store.find("b/1.webp", any_suffix=True) == "b/1.png"
    assert store.find("2.jpg") == "b/2.jpg"
    for name in ("1.png", "2"):
        with pytest.raises(ImageError, match="name its folder"):
            store.image(name)


def test_damaged_archives(tmp_path: Path) -> None:
    spec = write_pair_task(tmp_path / "data", 1)
    whole = zipped(tmp_path / "data", tmp_path / "data.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="got neither"):
        open_task(spec, tmp_path / "cut.zip")
    data = open_task(spec, tmp_path / "data.zip")
    at = whole.index(b"\x89PNG") if b"\x89PNG" in whole else whole.index(b"0.png") + 40
    spoilt = bytearray(whole)
    spoilt[at : at + 60] = b"\0" * 60
    (tmp_path / "spoilt.zip").write_bytes(spoilt)
    with pytest.raises(ImageError, match="0.png cannot be"):
        Store(tmp_path / "spoilt.zip").image("0.png")
    assert data.pictures.image("0.png").size == (20, 18)


def test_the_published_items(real_data) -> None:
    """All of SugarCrepe, whose pictures are partly here under other suffixes."""
    data = open_task(
        "sugarcrepe",
        real_data("vl_sugarcrepe_open.zip"),
        real_data("det80_coco_val2017_open_320px.zip"),
    )
    assert len(data.items) == 7511
    assert len({item.category for item in data.items}) == 7
    stems = {Path(name).stem for name in data.pictures.names}
    here = [item for item in data.items if Path(item.images[0]).stem in stems]
    assert len(here) == 1107  # as many as the open part names
    assert data.pictures.image(here[0].images[0]).mode == "RGB"
    missing = next(item for item in data.items if item not in here)
    with pytest.raises(ImageError, match="has no file"):
        data.pictures.image(missing.images[0])
