"""``dive-fast likelihood``: its values are the library's, and it goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Said, assert_refused, call
from diffusers import DDPMPipeline, DDPMScheduler
from evaluate_inputs import write_pictures
from pictures import noise_picture
from PIL import Image
from tiny import NAMES, write_model
from tiny_class_unet import make_unet, write

from dive_fast import DiffusionClassifier, DiveFastError
from dive_fast.data.images import read_image
from dive_fast.evaluation import read_records


@pytest.fixture(scope="module")
def clf(dit_dir: Path) -> DiffusionClassifier:
    return DiffusionClassifier.from_pretrained(dit_dir)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, size in zip(paths, ((8, 8), (13, 10)), strict=True):
        noise_picture(size, 60).save(path)
    return paths


@pytest.fixture
def likelihood(capsys, dit_dir: Path):
    def run(*more: object) -> Said:
        return call(capsys, "likelihood", "--model", dit_dir, "--probes", 8, *more)

    return run


# -- the library's stream --------------------------------------------------------------------------


def test_the_stream_is_the_batch(clf, images) -> None:
    pictures = [read_image(path) for path in images]
    for unit in ("nats", "bits/dim"):
        asked = {"unit": unit, "probes": 12, "seed": 3}
        batch = clf.log_likelihood(pictures, [2, None, 0], **asked)
        items = [(0, pictures[0], [2, None]), (1, pictures[1], [None, 0, 2])]
        found = dict(clf.stream_log_likelihood(iter(items), **asked))
        assert found[0].classes == (2, None) and found[1].classes == (None, 0, 2)
        torch.testing.assert_close(found[0].values[0], batch.values[0, :2])
        torch.testing.assert_close(found[1].values[0], batch.values[1, [1, 2, 0]])
        torch.testing.assert_close(found[1].draws[0], batch.draws[1, [1, 2, 0]])
        torch.testing.assert_close(found[0].standard_errors[0], batch.standard_errors[0, :2])


def test_parts_of_a_likelihood(clf, images) -> None:
    whole = clf.log_likelihood(read_image(images[0]), [2, None, 0], probes=8)
    part = whole.of(0, 2)
    assert part.classes == (0, 2) and torch.equal(part.values, whole.values[:, [2, 0]])
    expected = clf.log_likelihood(read_image(images[0]), [0, 2], probes=8)
    score, error = part.score(whole.of(None))
    torch.testing.assert_close(score, expected.values - whole.values[:, 1:2])
    assert (error > 0).all()
    with pytest.raises(DiveFastError, match="expected conditions among .* got "):
        whole.of(1)


def test_bad_streams(clf, images) -> None:
    with pytest.raises(DiveFastError, match="expected one image for each key, got 2"):
        list(clf.stream_log_likelihood([(0, [read_image(p) for p in images], None)], probes=8))
    with pytest.raises(DiveFastError, match="that 4 divides"):
        list(clf.stream_log_likelihood([], probes=7))


def test_losses_that_are_no_numbers(tmp_path: Path, images) -> None:
    clf = DiffusionClassifier.from_pretrained(write_model(tmp_path / "dit"))
    clf.model.vocabulary.table[1] = math.nan
    with pytest.raises(DiveFastError, match="expected finite losses"):
        clf.log_likelihood(read_image(images[0]), [1], probes=8)


# -- images by their names -------------------------------------------------------------------------


def test_values_of_images(likelihood, clf, images) -> None:
    said = likelihood(*images, "--class", "star", "--class", "none", "--class", "0", "--json")
    assert (said.code, said.err) == (0, "")
    records = json.loads(said.out)
    expected = clf.log_likelihood([read_image(p) for p in images], ["star", None, 0], probes=8)
    score, score_error = expected.of(2, 0).score(expected.of(None))
    for i, record in enumerate(records):
        assert record["id"] == str(images[i]) and record["evaluations"] == 24
        told = record["conditions"]
        assert [one["class"] for one in told] == ["star", None, NAMES[0]]
        assert [one["row"] for one in told] == [2, None, 0]
        for j, one in enumerate(told):
            assert one["value"] == pytest.approx(expected.values[i, j].item(), rel=1e-5)
            error = expected.standard_errors[i, j].item()
            assert one["standard_error"] == pytest.approx(error, rel=1e-4)
        for j, column in ((0, 0), (2, 1)):
            assert told[j]["score"] == pytest.approx(score[i, column].item(), abs=1e-3)
            error = score_error[i, column].item()
            assert told[j]["score_standard_error"] == pytest.approx(error, rel=1e-3)
        assert "score" not in told[1]


def test_a_table_of_images(likelihood, images) -> None:
    said = likelihood(*images, "--class", "all", "--unit", "bits/dim")
    lines = said.out.splitlines()
    assert said.code == 0 and len(lines) == 1 + 2 * 4
    assert lines[0].split() == ["image", "condition", "bits/dim"]
    assert [line.split()[-4] for line in lines[2:5]] == list(NAMES[1:])
    both = likelihood(*images, "--class", "none", "--class", "cross").out.splitlines()
    assert both[0].endswith("above no class") and "no class" in both[1]
    assert likelihood(images[0]).out.splitlines()[1].split()[1:3] == ["no", "class"]


def test_bad_images_are_told_and_the_rest_go_on(likelihood, images, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("none")
    said = likelihood(tmp_path / "bad.png", images[0])
    assert said.code == 2 and len(said.out.splitlines()) == 2
    assert len(said.err.splitlines()) == 1 and "bad.png" in said.err
    said = likelihood(tmp_path / "missing.png")
    assert said.code == 2 and said.out == "" and len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either images or --data"),
        (("a.png", "--data", "digits"), "expected either images or --data"),
        (("a.png", "--limit", "2"), "--limit needs --data"),
        (("--data", "digits", "--class", "star"), "--class is for images that are named"),
        (("a.png", "--class", "heart"), "expected a class of .* got 'heart'"),
        (("a.png", "--class", "4"), r"a row in \[0, 4\), got 4"),
        (("a.png", "--unit", "bits"), "invalid choice: 'bits'"),
        (("a.png", "--probes", "10"), "that 4 divides, at least 8, got 10"),
        (("a.png", "--probes", "0"), "expected a whole number of at least 1"),
        (("a.png", "--seed", "x"), "expected a whole number from 0"),
    ],
)
def test_bad_options(likelihood, images, arguments, message, monkeypatch) -> None:
    monkeypatch.chdir(images[0].parent)
    assert_refused(likelihood(*arguments), message)


def test_pixels_are_needed_for_bits(capsys, latent_dit_dir: Path, images) -> None:
    given = (images[0], "--model", latent_dit_dir, "--probes", 8, "--unit", "bits/dim")
    assert_refused(call(capsys, "likelihood", *given), "bits/dim are those of 8-bit pixels")


def test_a_detector(capsys, layout_dir: Path, images) -> None:
    said = call(capsys, "likelihood", images[0], "--model", layout_dir)
    assert said.code == 2 and len(said.err.splitlines()) == 1 and "Traceback" not in said.err


# -- labelled images -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


def test_labels_against_no_class(likelihood, clf, folder: Path, tmp_path: Path) -> None:
    said = likelihood("--data", folder, "--out", tmp_path / "run", "--json")
    assert (said.code, said.err) == (0, "")
    records = read_records(tmp_path / "run")
    assert len(records) == 12
    scores, errors = [], []
    for key, record in records.items():
        row = NAMES.index(Path(key).parent.name)
        assert (record["truth"], record["truth_name"]) == (row, NAMES[row])
        picture = read_image(folder / key)
        given, plain = (clf.log_likelihood(picture, c, probes=8) for c in ([row], None))
        score, error = (found.item() for found in given.score(plain))
        told = record["conditions"]
        assert [one["row"] for one in told] == [row, None]
        assert told[0]["value"] == pytest.approx(given.values.item(), rel=1e-5)
        assert told[1]["value"] == pytest.approx(plain.values.item(), rel=1e-5)
        assert told[0]["score"] == pytest.approx(score, rel=1e-3, abs=1e-3)
        scores.append(told[0]["score"])
        errors.append(told[0]["score_standard_error"])
    summary = json.loads(said.out)
    assert summary["n"] == 12 and summary["evaluations_per_image"] == 16
    assert summary["score"]["mean"] == pytest.approx(np.mean(scores))
    spread = np.std(scores, ddof=1) / 12**0.5
    assert summary["score"]["standard_error_images"] == pytest.approx(spread)
    assert summary["score"]["standard_error_probes"] == pytest.approx(np.mean(errors))
    assert summary["score_above_0"] == pytest.approx(np.mean(np.array(scores) > 0))


def test_resumed(likelihood, folder: Path, tmp_path: Path) -> None:
    """After a kill: torn last line dropped, nothing repeated or lost, the same values."""
    whole = likelihood("--data", folder, "--out", tmp_path / "run", "--readers", 0)
    results = tmp_path / "run" / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert likelihood("--data", folder, "--out", tmp_path / "run", "--readers", 0) == whole
    again = results.read_bytes().splitlines(keepends=True)
    assert again[:5] == lines[:5] and len(again) == 12
    for one, other in zip(lines, again, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert one["id"] == other["id"]
        assert one["conditions"][0]["value"] == pytest.approx(other["conditions"][0]["value"])
    said = likelihood("--data", folder, "--out", tmp_path / "run", "--seed", 1)
    assert_refused(said, "another configuration: likelihood.seed is 0 there and 1 here")


def test_images_resume_too(likelihood, images, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    likelihood(images[0], *out)
    first = (tmp_path / "run" / "results.jsonl").read_bytes()
    said = likelihood(*images, *out)
    after = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert after.startswith(first) and after.count(b"\n") == 2
    assert len(said.out.splitlines()) == 3
    said = likelihood(*images, *out, "--class", "star")
    assert_refused(said, "another configuration: conditions")


def test_a_limit_and_text(likelihood, folder: Path) -> None:
    said = likelihood("--data", folder, "--limit", 5)
    assert said.code == 0
    lines = {line[:33].strip(): line[33:].split() for line in said.out.splitlines()}
    assert lines["images"] == ["5"] and lines["evaluations per image"] == ["16"]
    assert len(lines["log p(x | label) - log p(x), nats"]) == 3


def test_bad_labelled_images(likelihood, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    (data / NAMES[0] / "00.png").write_text("none")
    said = likelihood("--data", data)
    assert said.code == 2 and "images that failed" in said.out and "00.png" in said.err
    for path in data.rglob("*.png"):
        path.write_text("none")
    assert likelihood("--data", data).out == "no image could be read (12 failed)\n"


def test_a_model_without_no_class(capsys, tmp_path: Path, folder: Path) -> None:
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler())
    model = write(pipeline, tmp_path / "unet", {"id2label": dict(enumerate(NAMES))})
    said = call(capsys, "likelihood", "--model", model, "--data", folder, "--probes", 8)
    assert said.code == 0 and "has not learned a condition that means no class" in said.err
    assert "under the label" in said.out and "log p(x | label)" not in said.out
    said = call(capsys, "likelihood", "--model", model, next(folder.rglob("*.png")))
    assert_refused(said, "has not learned a condition that means no class")


def test_grey_and_colour(likelihood, images, tmp_path: Path) -> None:
    Image.open(images[0]).convert("RGB").save(tmp_path / "colour.png")
    records = json.loads(likelihood(images[0], tmp_path / "colour.png", "--json").out)
    values = [record["conditions"][0]["value"] for record in records]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
