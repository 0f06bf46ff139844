"""Every source of data on the command line: evaluated, gone on with elsewhere, refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from command import assert_refused, call
from pictures import noise_picture
from tiny import read_json

CLASSES = ("cat", "dog")


def png(value: int) -> bytes:
    file = io.BytesIO()
    noise_picture((12, 12 + value), 80).save(file, "PNG")
    return file.getvalue()


def write_table(folder: Path) -> str:
    lines = ["file,label,site"]
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
        lines.append(f"{i}.png,{CLASSES[i % 2]},x")
    (folder / "t.csv").write_text("\n".join(lines))
    return "t.csv"


def write_tars(folder: Path) -> str:
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for name, content in (
                ("a.png", png(0)), ("a.cls", b"cat"), ("b.png", png(1)), ("b.cls", b"dog"),
            ):  # fmt: skip
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return "wds:{0..1}.tar"


def write_hub_set(folder: Path) -> str:
    hf = pytest.importorskip("datasets")
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(CLASSES))})
    images = [{"bytes": png(i), "path": None} for i in range(4)]
    cells = {"image": images, "label": [0, 1, 0, 1]}
    (folder / "pets").mkdir()
    hf.Dataset.from_dict(cells, features=features).to_parquet(folder / "pets" / "test.parquet")
    return "hf:pets@test"


def write_stream(folder: Path) -> str:
    return f"{write_hub_set(folder)}?streaming=true"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import datasets
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.mark.parametrize("write", [write_table, write_tars, write_hub_set, write_stream])
def test_a_run_goes_on_where_the_data_were_moved(write, sd, tmp_path, capsys, monkeypatch) -> None:
    """A text-conditional model is asked about what the data call their classes."""
    (tmp_path / "one").mkdir()
    spec = write(tmp_path / "one")
    monkeypatch.chdir(tmp_path / "one")
    arguments = ["evaluate", "--model", sd, "--data", spec, "--probes", 4, "--json"]
    arguments += ["--out", tmp_path / "run", "--limit", 4]
    said = call(capsys, *arguments)
    assert said.code == 0, said.err
    assert json.loads(said.out)["n"] == 4
    assert "a photo of a cat." in json.dumps(read_json(tmp_path / "run" / "run.json"))
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    truths = {r["id"]: r["truth"] for r in map(json.loads, lines)}
    assert list(dict(sorted(truths.items())).values()) == [0, 1, 0, 1]

    shutil.move(tmp_path / "one", tmp_path / "two")
    monkeypatch.chdir(tmp_path / "two")
    again = call(capsys, *arguments)
    assert again.code == 0, again.err
    assert (tmp_path / "run" / "results.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    "spec, got",
    [
        ("gone.csv", "gone.csv: expected 'digits', a folder by class, .* but nothing is there"),
        ("t.csv?label=species", "expected a column 'species', got the columns 'file', 'label'"),
        ("wds:{0..1}.tar", "expected tar files, but 0.tar is not there"),
        ("hf:pets", r"expected hf:NAME\[:CONFIG\]@SPLIT, got the splits test"),
        ("hf:pets@train", "hf:pets@train: cannot be loaded: "),
        ("hf:pets@test?label=file", "expected a column 'file', got the columns 'image', 'label'"),
    ],
)
def test_refused(spec: str, got: str, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path)
    write_hub_set(tmp_path)
    said = call(capsys, "evaluate", "--data", spec, "--out", tmp_path / "run")
    assert_refused(said, got)
    assert not (tmp_path / "run").exists()


def test_unknown_lists(sd, tmp_path, capsys) -> None:
    noise_picture((20, 16), 80).save(tmp_path / "image.png")
    find_spec("open_clip") or pytest.skip("the lists come with open_clip")
    for options, got in (
        (("--classes", "open_clip:food"), "one of open_clip's lists imagenet"),
        (("--classes", "cat,dog", "--template", "open_clip:x"), "lists openai, simple"),
    ):
        said = call(capsys, "classify", tmp_path / "image.png", "--model", sd, *options)
        assert_refused(said, got)
