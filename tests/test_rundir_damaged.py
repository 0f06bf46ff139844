"""Files of a run directory that are damaged: one sentence, and nothing is overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rundir_inputs import CONFIG, lines, record

from dive_fast.errors import RunError
from dive_fast.evaluation.rundir import RunDirectory, read_records

DEEP = '{"config": ' + "[" * 100_000 + "]" * 100_000 + "}"


def special(path: Path, kind: str) -> None:
    """Puts something in the file's place that is no file."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "not there")


class TestDamagedRun:
    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "{}", '{"config": 3}', '{"config": []}', "null", "\udcff", "\0" * 9, DEEP],
        ids=lambda content: content[:16],
    )
    def test_damaged_run_json(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
        (tmp_path / "results.jsonl").touch()
        with pytest.raises(RunError, match="'config', got a damaged file"):
            RunDirectory.open(tmp_path, CONFIG)
        with pytest.raises(RunError, match="'config', got a damaged file"):
            read_records(tmp_path)

    def test_utf_16(self, tmp_path: Path) -> None:
        RunDirectory.open(tmp_path, CONFIG).close()
        text = (tmp_path / "run.json").read_text()
        (tmp_path / "run.json").write_text(text, encoding="utf-16")
        with pytest.raises(RunError, match="damaged file"):
            RunDirectory.open(tmp_path, CONFIG)

    @pytest.mark.parametrize("schema", [True, "1", 1.5, [1], 10**300])
    def test_schema_that_is_not_ours(self, tmp_path: Path, schema: object) -> None:
        content = {"config": {"schema": schema}}
        (tmp_path / "run.json").write_text(json.dumps(content))
        with pytest.raises(RunError, match="records of schema 1, got schema") as caught:
            RunDirectory.open(tmp_path, CONFIG)
        assert len(str(caught.value)) < 400

    def test_long_values_are_cut_in_the_sentence(self, tmp_path: Path) -> None:
        there = {"schema": 1, **CONFIG, "model": "x" * 10**6, "seed": 10**300}
        (tmp_path / "run.json").write_text(json.dumps({"config": there}))
        with pytest.raises(RunError, match="model is 'xxx.*x' there and 'digits' here") as caught:
            RunDirectory.open(tmp_path, CONFIG)
        assert len(str(caught.value)) < 600

    def test_a_byte_order_mark_is_no_damage(self, tmp_path: Path) -> None:
        """Editors of some systems put one there."""
        with RunDirectory.open(tmp_path, CONFIG) as run:
            run.append(record(0))
        for name in ("run.json", "results.jsonl"):
            content = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert run.finished("image-0")
            run.append(record(1))
        assert list(read_records(tmp_path)) == ["image-0", "image-1"]

    @pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "device", "nowhere"])
    @pytest.mark.parametrize("name", ["run.json", "results.jsonl"])
    def test_no_file(self, tmp_path: Path, name: str, kind: str) -> None:
        RunDirectory.open(tmp_path, CONFIG).close()
        special(tmp_path / name, kind)
        message = "cannot be|expected a regular file, got something else"
        with pytest.raises(RunError, match=message):
            read_records(tmp_path)
        if (name, kind) != ("results.jsonl", "nowhere"):  # a link to where it is to be written
            with pytest.raises(RunError, match=message):
                RunDirectory.open(tmp_path, CONFIG)

    @pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
    def test_the_lock_is_no_file(self, tmp_path: Path, kind: str) -> None:
        special(tmp_path / ".lock", kind)
        with pytest.raises(RunError, match="expected a regular file"):
            RunDirectory.open(tmp_path, CONFIG)


class TestDamagedResults:
    def prepare(self, path: Path, content: bytes) -> None:
        RunDirectory.open(path, CONFIG).close()
        (path / "results.jsonl").write_bytes(content)

    @pytest.mark.parametrize(
        "tail",
        [
            b"{",
            b'{"id": "image-1", "la',
            b'{"id": "image-1", "label": 1}',
            b'{"id": "image-1", \n',
            b'{"label": 1}\n',
            b"\0" * 100,
            b"\xff\xfe\n",
            b"\n",
        ],
    )
    def test_torn_last_line(self, tmp_path: Path, tail: bytes) -> None:
        whole = json.dumps(record(0)).encode() + b"\n"
        self.prepare(tmp_path, whole + tail)
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert dict(run.done()) == {"image-0": record(0)}
            assert (tmp_path / "results.jsonl").read_bytes() == whole
            run.append(record(1))
        assert lines(tmp_path) == [record(0), record(1)]

    def test_only_a_torn_line(self, tmp_path: Path) -> None:
        self.prepare(tmp_path, b'{"id": "im')
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert not run.done()
        assert lines(tmp_path) == []

    @pytest.mark.parametrize("bad", [b"{", b"[]", b'{"label": 1}', b"", b"\xff"])
    def test_damage_in_the_middle(self, tmp_path: Path, bad: bytes) -> None:
        content = b'{"id": "a"}\n' + bad + b'\n{"id": "b"}\n'
        self.prepare(tmp_path, content)
        with pytest.raises(RunError, match=r"results\.jsonl.*damaged line 2"):
            RunDirectory.open(tmp_path, CONFIG)
        assert (tmp_path / "results.jsonl").read_bytes() == content

    def test_first_of_duplicates_counts(self, tmp_path: Path) -> None:
        self.prepare(tmp_path, b'{"id": "a", "n": 1}\n{"id": "a", "n": 2}\n')
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert dict(run.done()) == {"a": {"id": "a", "n": 1}}

    def test_a_long_damaged_line(self, tmp_path: Path) -> None:
        self.prepare(tmp_path, b'{"id": "a"}\n' + b"x" * 10**7 + b'\n{"id": "b"}\n')
        with pytest.raises(RunError, match="damaged line 2") as caught:
            RunDirectory.open(tmp_path, CONFIG)
        assert len(str(caught.value)) < 400
