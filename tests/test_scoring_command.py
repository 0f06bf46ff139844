"""``dive-fast score`` and ``dive-fast choose``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import assert_refused, call
from direct_scores import colour_picture
from PIL import Image

from dive_fast import ImageTextScorer, RunError
from dive_fast.evaluation import read_records
from dive_fast.evaluation.table import RunTable

TEXTS = ("a cat", "two dogs", "of")
LINES = [
    {"id": "a", "image": "0.png", "candidates": ["a cat", "two dogs"]},
    {"id": "b", "image": "1.png", "candidates": ["of", "a cat", "a red dog"], "mask": "mask.png"},
    {"id": "c", "image": "2.png", "candidates": ["two dogs", "photo"], "mask": None},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        colour_picture((16, 16), i).save(folder / f"{i}.png")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[2:9, 4:] = 200
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "broken.png").write_bytes(b"none")
    return folder


def write_items(folder: Path, lines: list, name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# -- score -----------------------------------------------------------------------------------------


def test_score(sd, folder, capsys):
    paths = [folder / "0.png", folder / "2.png"]
    asked = ["--model", sd, "--probes", 4, "--seed", 2]
    said = call(capsys, "score", *paths, "--text", *TEXTS, *asked, "--lift", "--json")
    assert said.code == 0, said
    found = json.loads(said.out)
    scorer = ImageTextScorer.from_pretrained(sd, device="cpu")
    expected = scorer.score(paths, TEXTS, probes=4, seed=2, unconditional=True)
    assert found["texts"] == list(TEXTS) and found["probes"] == 4
    assert found["evaluations"] == 2 * 4 * 4 and found["beta"] == 128
    for i, row in enumerate(found["images"]):
        assert row["id"] == str(paths[i]) and row["best"] == expected.best[i]
        assert row["losses"] == pytest.approx(expected.losses[i].tolist(), rel=1e-4)
        assert row["lift"] == pytest.approx(expected.lift()[i].tolist(), abs=1e-2)
        assert len(row["standard_errors"]) == len(row["log_posterior"]) == 3
    said = call(capsys, "score", *paths, "--text", "a cat", "--text", "of", *asked)
    lines = said.out.splitlines()
    assert lines[:2] == ["  1  a cat", "  2  of"] and "lift" not in said.out
    assert [line.split("  ")[0] for line in lines[4:]] == [str(path) for path in paths]
    assert f"{expected.losses[1, 0].item():.4f}" in lines[5]
    said = call(capsys, "score", paths[0], "--text", "a cat", *asked, "--lift", "--probes", 1)
    assert said.code == 0 and "lift, nats" in said.out and "100%" in said.out


def test_score_with_texts_of_a_file_and_a_mask(sd, folder, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("a cat\n\n two dogs \nof\n")
    said = call(
        capsys, "score", folder / "0.png", folder / "1.png", "--texts", tmp_path / "texts.txt",
        "--mask", folder / "mask.png", "--model", sd, "--probes", 4, "--json",
    )  # fmt: skip
    found = json.loads(said.out)
    scorer = ImageTextScorer.from_pretrained(sd, device="cpu")
    images = [folder / "0.png", folder / "1.png"]
    expected = scorer.score(images, TEXTS, pixel_weights=folder / "mask.png", probes=4)
    for row, losses in zip(found["images"], expected.losses.tolist(), strict=True):
        assert row["losses"] == pytest.approx(losses, rel=1e-4)
    said = call(
        capsys, "score", folder / "0.png", folder / "broken.png", "--text", "a cat", "of",
        "--mask", folder / "mask.png", "--mask", folder / "mask.png", "--model", sd,
        "--probes", 4, "--json",
    )  # fmt: skip
    assert said.code == 2 and "broken.png" in said.err and len(said.err.splitlines()) == 1
    assert len(json.loads(said.out)["images"]) == 1


BAD_SCORES = [
    (["0.png", "--text", "a"], "expected --model with a text-to-image model"),
    (["0.png", "--model", "SD"], "at least 1 texts, got 0"),
    (["0.png", "--text", "a", "--model", "digits"], "text-to-image model, .* got digits"),
    (["0.png", "--text", "a", " ", "--model", "SD"], "not empty, got ' '"),
    (["away.png", "--text", "a", "--model", "SD"], "away.png: no such file"),
    (["0.png", "--texts", "away.txt", "--text", "a", "--model", "SD"], "away.txt: cannot be read"),
    (["0.png", "--texts", "0.png", "--model", "SD"], "text file in UTF-8"),
    (["0.png", "--text", "a", "--mask", "broken.png", "--model", "SD"], "broken.png: expected"),
    (
        ["0.png", "--text", "a", "--mask", "0.png", "--mask", "0.png", "--model", "SD"],
        "one --mask, or one for each of 1 images, got 2",
    ),
    (["0.png", "--text", "a", "--mask", "small.png", "--model", "SD"], "16 x 16, got 4 x 3"),
    (["0.png", "--text", "a", "--model", "SD", "--timesteps", "learned"], "no learned timesteps"),
]


@pytest.mark.parametrize("arguments, message", BAD_SCORES)
def test_score_refuses(sd, folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    Image.new("L", (4, 3), 255).save("small.png")
    asked = [sd if word == "SD" else word for word in arguments]
    assert_refused(call(capsys, "score", *asked, "--probes", 2), message)


# -- choose ----------------------------------------------------------------------------------------


def test_choose_and_resume(sd, folder, tmp_path, capsys):
    asked = ["--model", sd, "--probes", 6, "--strategy", "enumerate"]
    items = write_items(folder, LINES)
    said = call(capsys, "choose", items, *asked, "--out", tmp_path / "run")
    assert said.code == 0 and "items                  3" in said.out, said
    assert "candidates per item    2.3" in said.out and "evaluations per item   14" in said.out
    records = read_records(tmp_path / "run")
    for record in records.values():
        assert f"{record['id']}: {record['text']} (margin {record['margin']:.2f})" in said.out
    scorer = ImageTextScorer.from_pretrained(sd, device="cpu")
    stream = [
        (line["id"], folder / line["image"], line["candidates"],
         folder / line["mask"] if line.get("mask") else None)
        for line in LINES
    ]  # fmt: skip
    for key, choice in scorer.choose(stream, strategy="enumerate", probes=6):
        record = records[key]
        assert record["choice"] == choice.index and record["text"] == choice.text
        assert record["candidates"] == list(choice.texts)
        assert record["candidate_losses"] == pytest.approx(choice.losses.tolist(), rel=1e-4)
        assert record["margin"] == pytest.approx(choice.margin, abs=1e-2)
        assert record["candidate_probes"] == [6] * len(choice.texts)

    results = tmp_path / "run" / "results.jsonl"
    whole = results.read_bytes()
    call(capsys, "choose", items, *asked, "--out", tmp_path / "run")
    assert results.read_bytes() == whole
    kept = whole.splitlines(keepends=True)
    results.write_bytes(kept[0] + kept[1][:20])
    said = call(capsys, "choose", items, *asked, "--out", tmp_path / "run", "--json")
    assert json.loads(said.out)["n"] == 3 and results.read_bytes().startswith(kept[0])
    assert read_records(tmp_path / "run").keys() == records.keys()

    for changes in (["--probes", 8], ["--seed", 1], ["--strategy", "race"]):
        said = call(capsys, "choose", items, *asked, *changes, "--out", tmp_path / "run")
        assert_refused(said, "another configuration")
    others = write_items(folder, [*LINES[:2], {**LINES[2], "mask": "mask.png"}], "others.jsonl")
    said = call(capsys, "choose", others, *asked, "--out", tmp_path / "run")
    assert_refused(said, "another configuration: items")
    with pytest.raises(RunError, match="a run of a classifier, got one of 'choose'"):
        RunTable.read(tmp_path / "run")
    for command in (
        ["compare-runs", tmp_path / "run"],
        ["report", "--out", tmp_path / "page.html"],
    ):
        said = call(capsys, *command, tmp_path / "run")
        assert_refused(said, "a run of a classifier, got one of 'choose'")


def test_the_default_is_a_race(sd, folder, tmp_path, capsys):
    items = write_items(folder, LINES[:1])
    assert call(capsys, "choose", items, "--model", sd, "--out", tmp_path / "run").code == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["strategy"]["name"] == "race" and config["probes"] == 100


def test_items_that_fail(sd, folder, tmp_path, capsys):
    lines = [
        {"id": "broken", "image": "broken.png", "candidates": ["a", "b"]},
        LINES[0],
        {"id": "same", "image": "1.png", "candidates": ["a cat", "A CAT"]},
        {"id": "mask", "image": "later.png", "candidates": ["a", "b"], "mask": "mask.png"},
    ]
    items, out = write_items(folder, lines), tmp_path / "run"
    colour_picture((8, 9), 0).save(folder / "later.png")
    said = call(capsys, "choose", items, "--model", sd, "--probes", 4, "--out", out)
    assert said.code == 2 and "items that failed      3" in said.out
    assert len(said.err.splitlines()) == 3 and "'a cat' and 'A CAT'" in said.err
    records = read_records(out)
    assert "8 x 9, got 16 x 16" in records["mask"]["error"] and "error" not in records["a"]
    # What can be mended is tried again.
    colour_picture((16, 16), 0).save(folder / "later.png")
    said = call(capsys, "choose", items, "--model", sd, "--probes", 4, "--out", out, "--json")
    assert said.code == 2 and json.loads(said.out)["failed"] == 2
    assert "error" not in read_records(out)["mask"]
    items = write_items(folder, lines[:1])
    said = call(capsys, "choose", items, "--model", sd, "--out", tmp_path / "none")
    assert said.code == 2 and "no item could be used (1 failed)" in said.out


GOOD = json.dumps(LINES[0])
BAD_FILES = [
    ("", "expected items, a JSON object a line, got none"),
    ("\n\n{", "line 3: expected a JSON object, got '{'"),
    ("[1, 2]", "line 1: expected a JSON object"),
    (json.dumps({"image": "0.png", "candidates": ["a", "b"]}), "'id' as a text .* got None"),
    (json.dumps({**LINES[0], "id": 7}), "'id' as a text that is not empty, got 7"),
    (json.dumps({**LINES[0], "image": ""}), "'image' as a text that is not empty, got ''"),
    (json.dumps({**LINES[0], "mask": 3}), "'mask' as a text that is not empty, got 3"),
    (json.dumps({**LINES[0], "masks": "m.png"}), "no keys but id, .* got 'masks'"),
    (json.dumps({**LINES[0], "candidates": "ab"}), "'candidates' as a list .* got 'ab'"),
    (json.dumps({**LINES[0], "candidates": ["a"]}), "two texts or more"),
    (json.dumps({**LINES[0], "candidates": ["a", 3]}), "'candidates' as a list"),
    (f"{GOOD}\n{GOOD}\n", "line 2: the id 'a' is that of line 1"),
]


@pytest.mark.parametrize("content, message", BAD_FILES)
def test_files_that_are_none(folder, tmp_path, capsys, content, message):
    (tmp_path / "items.jsonl").write_text(content)
    # Found before any model is looked for.
    said = call(
        capsys, "choose", tmp_path / "items.jsonl", "--model", "/none", "--out", tmp_path / "run"
    )
    assert_refused(said, message)


def test_choose_refuses(sd, folder, tmp_path, capsys):
    items = write_items(folder, LINES)
    for arguments, message in (
        (["away.jsonl", "--model", sd], "away.jsonl: cannot be read"),
        ([folder / "0.png", "--model", sd], "text file in UTF-8"),
        ([items], "expected --model"),
        ([items, "--model", "digits"], "text-to-image model"),
        ([items, "--model", sd, "--strategy", "best"], "expected a strategy of"),
        ([items, "--model", sd, "--set", "erro=1"], "unknown setting 'erro'"),
    ):
        assert_refused(call(capsys, "choose", *arguments, "--out", tmp_path / "run"), message)
    assert_refused(call(capsys, "choose", items, "--model", sd), "required: --out")
    (tmp_path / "file").write_text("")
    said = call(capsys, "choose", items, "--model", sd, "--out", tmp_path / "file")
    assert_refused(said, "expected a directory, got a file")
