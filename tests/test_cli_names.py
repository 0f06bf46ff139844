"""File names that are no UTF-8, and letters that the terminal lacks, on the command line."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from command import assert_refused, call
from pictures import noise_picture

from dive_fast.cli import main

BYTES = b"\xff\xe9.png"  # latin-1, as old archives have it
NAME = os.fsdecode(BYTES)
SHOWN = "\\udcff\\udce9.png"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_picture((8, 8), 80).save(path)
    return path


def test_classify(dit_dir: Path, tmp_path: Path, capsys) -> None:
    path = picture(tmp_path / NAME)
    arguments = ("classify", path, "--model", dit_dir, "--probes", 2)
    said = call(capsys, *arguments)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"{tmp_path}/{SHOWN}: ")
    (record,) = json.loads(call(capsys, *arguments, "--json").out)
    assert record["id"] == str(path)
    path.write_bytes(b"no image")
    assert_refused(call(capsys, *arguments), "udcff.*: expected an image")
    path.unlink()
    assert_refused(call(capsys, *arguments), "udcff.*: no such file or folder")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_the_letters(
    encoding: str, dit_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (NAME, "\u4e2d.png"):
        picture(tmp_path / name)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    missing = tmp_path / "\u4e2d"
    assert main(["classify", str(tmp_path), str(missing), "--model", str(dit_dir)]) == 2
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        f"{tmp_path}/\\u4e2d.png", f"{tmp_path}/{SHOWN}"
    ]  # fmt: skip
    assert err == f"dive-fast: {tmp_path}/\\u4e2d: no such file or folder.\n"
    # As it was for whoever called main.
    assert [stream.errors for stream in streams] == ["strict", "strict"]


def test_no_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["classify", str(tmp_path / "missing.png")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_evaluate_resumes(dit_dir: Path, tmp_path: Path, capsys) -> None:
    """The record's id is the file's name again."""
    data = tmp_path / "data"
    picture(data / "circle" / NAME)
    broken = data / "circle" / ("a" + NAME)
    broken.write_bytes(b"no image")
    arguments = ("evaluate", "--model", dit_dir, "--data", data, "--out", tmp_path / "run")
    arguments += ("--probes", 2, "--json")
    said = call(capsys, *arguments)
    assert said.code == 2 and json.loads(said.out)["failed"] == 1
    assert "udcff" in said.err and len(said.err.splitlines()) == 1
    lines = (tmp_path / "run" / "results.jsonl").read_text("ascii").splitlines()
    ids = {json.loads(line)["id"] for line in lines}
    assert ids == {f"circle/{NAME}", f"circle/a{NAME}"}
    # What is finished has its record already, and an error is not written twice.
    again = call(capsys, *arguments)
    assert again.code == 2 and json.loads(again.out)["n"] == 1
    assert (tmp_path / "run" / "results.jsonl").read_text("ascii").splitlines() == lines


def test_a_folder_of_a_class_that_is_no_text(dit_dir: Path, sd: Path, tmp_path: Path, capsys):
    picture(tmp_path / "data" / NAME / "a.png")
    picture(tmp_path / "data" / "cat" / "a.png")
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "run")
    said = call(capsys, "evaluate", "--model", dit_dir, *arguments)
    assert_refused(said, "does not know the classes .*udcff")
    # A text-conditional model would make prompts of the folders' names.
    said = call(capsys, "evaluate", "--model", sd, *arguments)
    assert_refused(said, "classes must hold texts that are not empty, got .*udcff")


def test_detect(scenes_model: Path, tmp_path: Path, capsys) -> None:
    path = picture(tmp_path / NAME)
    arguments = ("detect", path, "--model", scenes_model, "--out", tmp_path / "run")
    arguments += ("--strategy", "invert", "--probes", 2)
    for _ in range(2):  # the second time from the records
        said = call(capsys, *arguments)
        assert said.code == 0 and said.out.startswith(f"{tmp_path}/{SHOWN}: ")
    assert os.listdir(os.fsencode(tmp_path / "run" / "drawn")) == [BYTES]
