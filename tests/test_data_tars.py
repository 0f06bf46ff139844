"""Tar files of webdataset."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dive_fast.data import folder_classes, open_dataset, select
from dive_fast.data.tar_shards import expand_braces
from dive_fast.errors import DataError, ImageError

CLASSES = ("tench", "goldfish", "great white shark")


def picture(value: int, size: tuple[int, int] = (4, 3), suffix: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("L", size, value).save(file, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return file.getvalue()


def save_tar(path: Path, *members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, value: int, label: object = "1") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture(value)), (f"{key}.cls", str(label).encode())]


class TestOpen:
    @pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    def test_shards_in_order(self, tmp_path: Path, form: int) -> None:
        for shard in range(3):
            members = sum((sample(f"x{shard}{i}", 10 * shard + i, i) for i in range(3)), [])
            save_tar(tmp_path / f"{shard:03d}.tar", *members, form=form)
        dataset = open_dataset(f"wds:{tmp_path}/{{000..002}}.tar", CLASSES)
        ids = [f"{shard:03d}.tar/x{shard}{i}" for shard in range(3) for i in range(3)]
        assert list(dataset.ids) == ids and dataset.labels.tolist() == [0, 1, 2] * 3
        assert [np.asarray(e.load()).max() for e in dataset.examples] == [
            0,
            1,
            2,
            10,
            11,
            12,
            20,
            21,
            22,
        ]
        assert dataset.name == "{000..002}.tar" and dataset.names is None
        for spec in (f"wds:{tmp_path}/*.tar", f"wds:{tmp_path}", f"wds:{tmp_path}/00?.tar"):
            assert list(open_dataset(spec, CLASSES).ids) == ids

    def test_agrees_with_the_files_unpacked(self, tmp_path: Path) -> None:
        """With suffixes, folders and long names as tar files of photographs have them."""
        rng = np.random.default_rng(0)
        members = []
        for i, suffix in enumerate(("jpg", "png", "webp", "JPG")):
            file = io.BytesIO()
            kind = {"jpg": "JPEG"}.get(suffix.lower(), suffix.upper())
            Image.fromarray(rng.integers(0, 256, (9, 7 + i, 3), np.uint8)).save(file, kind)
            key = f"./deep/{'long' * 30}/a{i}"
            members += [(f"{key}.{suffix}", file.getvalue()), (f"{key}.cls", b"goldfish\n")]
        path = save_tar(tmp_path / "a.tar", *members)
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "out", filter="data")
        dataset = open_dataset(f"wds:{path}", CLASSES)
        for example, (name, _) in zip(dataset.examples, members[::2], strict=True):
            with Image.open(tmp_path / "out" / name) as image:
                np.testing.assert_array_equal(np.asarray(example.load()), np.asarray(image))
        assert dataset.labels.tolist() == [1] * 4 and dataset.names == ("goldfish",)

    def test_json_label_and_facts(self, tmp_path: Path) -> None:
        entries = {"class": "Goldfish", "site": "x", "n": 2, "box": [1]}
        path = save_tar(
            tmp_path / "a.tar", ("a.png", picture(1)), ("a.json", json.dumps(entries).encode())
        )
        (example,) = open_dataset(f"wds:{path}", CLASSES).examples
        assert (example.id, example.label) == ("a.tar/a", 1)
        assert example.facts == {"site": "x", "n": 2}

    def test_cls_goes_before_json(self, tmp_path: Path) -> None:
        members = [*sample("a", 3, 2), ("a.json", b'{"label": 0, "site": "y"}')]
        path = save_tar(tmp_path / "a.tar", *members)
        (example,) = open_dataset(f"wds:{path}", CLASSES).examples
        assert (example.label, example.facts) == (2, {"label": 0, "site": "y"})
        (example,) = open_dataset(f"wds:{path}?label=label", CLASSES).examples
        assert (example.label, example.facts) == (0, {"site": "y"})

    def test_what_is_no_sample(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        members = [("README", b"x"), ("._a.png", b"x"), ("b.cls", b"0"), *sample("a", 1)]
        path = save_tar(tmp_path / "a.tar", *members)
        with tarfile.open(path, "a") as tar:
            folder = tarfile.TarInfo("c.png")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        assert list(open_dataset(f"wds:{path}", CLASSES).ids) == ["a.tar/a"]
        assert "left out 1 samples without an image" in caplog.text

    def test_several_images(self, tmp_path: Path) -> None:
        members = [("a.seg.png", picture(9)), ("a.tif", picture(7, suffix="tiff")), *sample("a", 1)]
        path = save_tar(tmp_path / "a.tar", *members)
        with pytest.raises(DataError, match=r"'a': expected one image, got 'tif', 'png': name one"):
            open_dataset(f"wds:{path}", CLASSES)
        for extension, value in (("tif", 7), ("png", 1), ("seg.png", 9)):
            (example,) = open_dataset(f"wds:{path}?image={extension}", CLASSES).examples
            assert np.asarray(example.load()).max() == value

    def test_a_bad_picture_is_its_own_error(self, tmp_path: Path) -> None:
        members = [("a.png", b"no image"), ("a.cls", b"1"), ("b.png", b""), ("b.cls", b"1")]
        cut = picture(5, (90, 90))[:60]
        path = save_tar(
            tmp_path / "a.tar", *members, ("c.png", cut), ("c.cls", b"1"), *sample("d", 4)
        )
        *bad, good = open_dataset(f"wds:{path}", CLASSES).examples
        for example in bad:
            with pytest.raises(ImageError, match=f"^{example.id}: "):
                example.load()
        assert np.asarray(good.load()).max() == 4
        path.unlink()
        with pytest.raises(ImageError, match="a.tar/d: .* cannot be read"):
            good.load()

    def test_folders_of_shards(self, tmp_path: Path) -> None:
        for place in ("one", "two"):
            save_tar(tmp_path / place / "0.tar", *sample("a", 1))
        dataset = open_dataset(f"wds:{tmp_path}/one/0.tar::{tmp_path}/two/0.tar", CLASSES)
        assert list(dataset.ids) == ["one/0.tar/a", "two/0.tar/a"]

    def test_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for place in ("one", "two"):
            save_tar(tmp_path / place / "0.tar", *sample("a", 1), *sample("b", 2, 2))
        monkeypatch.chdir(tmp_path)
        one, two = (open_dataset(f"wds:{place}/0.tar", CLASSES) for place in ("one", "two"))
        assert one.identity() == two.identity()
        sent = pickle.dumps(select(one, 1, 0))
        monkeypatch.chdir("/")
        (example,) = pickle.loads(sent).examples
        assert np.asarray(example.load()).shape == (3, 4)
        assert list(open_dataset(one.where, CLASSES).ids) == list(one.ids)

    def test_a_shard_that_changed_is_read_anew(self, tmp_path: Path) -> None:
        path = save_tar(tmp_path / "a.tar", *sample("a", 1))
        assert len(open_dataset(f"wds:{path}", CLASSES).examples) == 1
        save_tar(path, *sample("a", 1), *sample("b", 1))
        assert len(open_dataset(f"wds:{path}", CLASSES).examples) == 2


def test_classes(tmp_path: Path) -> None:
    path = save_tar(tmp_path / "a.tar", *sample("a", 1, "dog"), *sample("b", 1, "cat"))
    assert folder_classes(f"wds:{path}") == ["cat", "dog"]
    path = save_tar(tmp_path / "b.tar", *sample("a", 1, 0))
    assert folder_classes(f"wds:{path}") is None


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("x{a,b}{0..1}y", ["xa0y", "xa1y", "xb0y", "xb1y"]),
        ("{a}{}", ["{a}{}"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


BAD = {
    "empty": ([], "expected samples with an image"),
    "none": ([("a.cls", b"0")], "expected samples with an image"),
    "label": ([("a.png", picture(0))], "sample 'a': expected a label .*, got 'png'"),
    "twice": ([*sample("a", 0), ("a.PNG", b"")], "expected each member once, got 'a.PNG' twice"),
    "unknown": (sample("a", 0, "dog"), "does not know the classes 'dog'"),
    "index": (sample("a", 0, 3), "does not know the classes 3: .* indices 0 to 2"),
    "blank": (sample("a", 0, ""), "sample 'a', .cls: expected the name or index of a class"),
    "key": ([("a.png", b""), ("a.json", b'{"x": 1}')], "expected a column called label.*'x'"),
    "json": ([("a.png", b""), ("a.json", b"{")], "sample 'a', .json: expected JSON"),
    "list": ([("a.png", b""), ("a.json", b"[1]")], "sample 'a', .json: expected an object"),
    "kind": (
        [("a.png", b""), ("a.json", b'{"label": 1.5}')],
        "name or index of a class in 'label'",
    ),
}


class TestRefused:
    @pytest.mark.parametrize("members, got", BAD.values(), ids=BAD)
    def test_content(self, tmp_path: Path, members: list, got: str) -> None:
        path = save_tar(tmp_path / "a.tar", *members)
        with pytest.raises(DataError, match=f"a.tar: .*{got}|a.tar: {got}"):
            open_dataset(f"wds:{path}", CLASSES)

    @pytest.mark.parametrize(
        "kind, pack", [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)]
    )
    def test_compressed(self, tmp_path: Path, kind: str, pack) -> None:
        path = save_tar(tmp_path / "a.tar", *sample("a", 0))
        path.write_bytes(pack(path.read_bytes()))
        with pytest.raises(DataError, match=f"not compressed, got {kind}: "):
            open_dataset(f"wds:{path}", CLASSES)

    @pytest.mark.parametrize("content", [b"", b"no tar file" * 100, None])
    def test_damaged(self, tmp_path: Path, content: bytes | None) -> None:
        path = save_tar(
            tmp_path / "a.tar", *sample("a", 0), ("b.png", bytes(5000)), ("b.cls", b"0")
        )
        path.write_bytes(path.read_bytes()[:5000] if content is None else content)
        with pytest.raises(DataError, match="a.tar: no tar file, or cut off or damaged"):
            open_dataset(f"wds:{path}", CLASSES)

    def test_places(self, tmp_path: Path) -> None:
        save_tar(tmp_path / "0.tar", *sample("a", 0))
        (tmp_path / "empty").mkdir()
        for pattern, got in (
            ("{0..1}.tar", "1.tar is not there"),
            ("x*.tar", r"x\*.tar is not there"),
            ("empty", r"empty/\*.tar is not there"),
            ("{0,0}.tar", "each tar file once, got .*0.tar twice"),
            ("0.tar?lable=x", "expected the options image, label, got 'lable'"),
            ("0.tar?label=txt", "'a': expected a label .txt, got 'png', 'cls'"),
            ("0.tar?image=jpg", "expected samples with an image"),
        ):
            with pytest.raises(DataError, match=got):
                open_dataset(f"wds:{tmp_path}/{pattern}", CLASSES)
