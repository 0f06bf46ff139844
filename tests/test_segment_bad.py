"""What ``segment`` and its command refuse, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from PIL import Image
from toy_layout import PictureModel

from dive_fast import Detections, DiffusionClassifier, LayoutDetector
from dive_fast.core.segmentation import SegmentationRule
from dive_fast.errors import DiveFastError
from dive_fast.evaluation import read_records

FAST = [part for name in ("rough", "step", "final") for part in ("--set", f"{name}_probes=2")]


@pytest.fixture(scope="module")
def clf(dit_dir: Path) -> DiffusionClassifier:
    return DiffusionClassifier.from_pretrained(dit_dir)


@pytest.fixture(scope="module")
def detector() -> LayoutDetector:
    return LayoutDetector(PictureModel())


PICTURE = np.zeros((8, 8), np.uint8)
SCENE_PICTURE = np.zeros((6, 5, 3), np.uint8)
BOX = [[0.0, 0.0, 3.0, 3.0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": ["heart", "star"]}, "expected a class of .* got 'heart'"),
        ({"classes": [0, 9]}, r"a row in \[0, 4\), got 9"),
        ({"classes": ["star"]}, "expected two classes at least to tell apart, got 'star' alone"),
        ({"classes": []}, "expected two classes at least to tell apart, got none"),
        ({"classes": ["star", 2]}, "expected every class once, got 'star' more than once"),
        ({"classes": "star"}, "expected a list of classes, got 'star'"),
        ({"background": 1}, "background must be True or False"),
        ({"rule": 3.0}, "rule must be a SegmentationRule or None"),
        ({"probes": 0}, "the number of probes must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"images": None}, "expected either images or latents"),
        ({"images": None, "latents": torch.zeros(1, 1, 8, 9)}, "latents must have shape"),
    ],
)
def test_bad_input_of_classes(clf, given, message) -> None:
    with pytest.raises(DiveFastError, match=message):
        clf.segment(**{"images": PICTURE, "probes": 2, **given})


def test_no_class_is_not_every_models(clf, monkeypatch) -> None:
    monkeypatch.setattr(clf.model.vocabulary, "unconditional", None)
    with pytest.raises(DiveFastError, match="has not learned a condition that means no class"):
        clf.segment(PICTURE, background=True)


def test_a_layout_model_as_classifier(layout_dir: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(layout_dir)
    with pytest.raises(DiveFastError, match="expected a model of classes, got the layout-to-image"):
        clf.segment(PICTURE)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([np.zeros((8, 9), int)], r"of its image's size \[8, 8\], got int64 \[8, 9\]"),
        ([np.zeros((8, 8))], "a mask of whole numbers"),
        ([np.full((8, 8), 4)], r"numbers in \[-1, 4\), got 4"),
        ([np.full((8, 8), -2)], "got -2"),
        ([np.full((8, 8), -1)], "got none that can be shown"),
        ([], "expected 1 masks, one per image, got 0"),
        (3, "expected a mask for each image, got 3"),
    ],
)
def test_bad_masks_of_classes(clf, masks, message) -> None:
    with pytest.raises(DiveFastError, match=message):
        clf.fit_segmentation([PICTURE], masks, probes=2)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([np.zeros((5, 6), int)], r"of its image's size \[6, 5\], got int64 \[5, 6\]"),
        ([np.full((6, 5), 4)], r"numbers in \[-1, 4\), got 4"),
        ([], "expected 1 masks, one per image, got 0"),
        (None, "expected 1 masks, one per image, got None"),
    ],
)
def test_bad_masks_of_layouts(detector, masks, message) -> None:
    with pytest.raises(DiveFastError, match=message):
        detector.fit_segmentation([SCENE_PICTURE], masks)


def test_bad_input_of_layouts(detector) -> None:
    good = Detections(BOX, [0], [1.0], detector.names)
    for given, message in [
        ({"detections": [good, good]}, "expected detections of each of 1 images, got 2"),
        ({"detections": good}, "expected detections of each of 1 images"),
        ({"detections": [BOX]}, "expected Detections of each image"),
        ({"detections": [Detections(BOX, [0], [1.0], ("a",))]}, "the model's own classes"),
        ({"detections": [Detections(BOX * 4, [0] * 4, [1] * 4, detector.names)]}, "at most 3 obj"),
        ({"map_probes": 0}, "map_probes must be at least 1"),
        ({"rule": {}}, "rule must be a SegmentationRule or None"),
        ({"strategy": "guess"}, "guess"),
        ({"latents": torch.zeros(1)}, "latents"),
    ]:
        with pytest.raises(DiveFastError, match=message):
            detector.segment(SCENE_PICTURE, **given)


@pytest.mark.parametrize(
    "given",
    [{"gamma": 0}, {"gamma": True}, {"gamma": float("inf")}, {"sigma": -1}, {"sigma": 1.1}]
    + [{"background": None}, {"background": float("nan")}],
)
def test_bad_rules(given) -> None:
    with pytest.raises(DiveFastError, match=f"{next(iter(given))} must be"):
        SegmentationRule(**{"gamma": 1.0, **given})


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two of one name, of odd sizes."""
    paths = [tmp_path / "0.png", tmp_path / "more" / "0.png"]
    paths[1].parent.mkdir()
    for path, size in zip(paths, [(9, 12), (17, 8)], strict=True):
        draw = np.random.default_rng(size[0]).integers
        Image.fromarray(draw(0, 256, size[::-1], np.uint8)).save(path)
    return paths


def test_the_command_of_classes(dit_dir, clf, pictures, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    arguments = ("--model", dit_dir, "--probes", 4, "--classes", "star,circle", "--out", out)
    said = call(capsys, "segment", *pictures, *arguments, "--posterior")
    assert said.code == 0 and not said.err
    assert [line.partition(":")[0] for line in said.out.splitlines()] == [str(p) for p in pictures]
    records = read_records(out)
    for path in pictures:
        (found,) = clf.segment(path, ["star", "circle"], probes=4)
        record = records[str(path)]
        assert record["classes"] == ["star", "circle"] and record["size"] == [8, 8]
        assert record["areas"] == pytest.approx(found.areas) and record["evaluations"] == 8
        with Image.open(out / record["label_map"]) as image:
            assert image.mode == "P" and np.array_equal(np.asarray(image), found.labels)
        with Image.open(out / record["overlay"]) as image:
            assert image.size == found.draw().size
        with np.load(out / record["posterior"]) as file:
            assert np.allclose(file["posterior"], found.posterior, atol=1e-5)
            assert file["classes"].tolist() == ["star", "circle"]
    assert len({record["label_map"] for record in records.values()}) == 2


def test_the_command_of_layouts_goes_on(layout_dir, pictures, tmp_path, capsys) -> None:
    out, bad = tmp_path / "run", tmp_path / "bad.png"
    bad.write_text("no image")
    arguments = ("--model", layout_dir, "--out", out, "--probes", 4, *FAST)
    assert call(capsys, "segment", pictures[0], *arguments).code == 0
    seconds = read_records(out)[str(pictures[0])]["seconds"]
    said = call(capsys, "segment", *pictures, bad, tmp_path / "missing.png", *arguments)
    assert said.code == 2 and "Traceback" not in said.err and len(said.err.splitlines()) == 2
    records = read_records(out)
    assert len(records) == 4 and records[str(pictures[0])]["seconds"] == seconds
    assert records[str(pictures[1])]["size"] == [17, 8]
    assert records[str(pictures[1])]["classes"] == ["one", "two", "three", "background"]
    said = call(capsys, "segment", pictures[0], *arguments, "--json")
    assert json.loads(said.out)[0]["seconds"] == seconds
    said = call(capsys, "segment", pictures[0], *arguments, "--posterior")
    assert_refused(said, "holds a run of another configuration: posterior")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "star"), "expected two classes at least .* got 'star' alone"),
        (("--classes", "star,heart"), "expected a class of .* got 'heart'"),
        (("--prior", "none"), "--prior is for models of layouts; .* is one of classes"),
        (("--strategy", "guided"), "--strategy is for models of layouts"),
        (("--set", "margin=1"), "--set is for models of layouts"),
        (("--probes", "0"), "expected a whole number of at least 1"),
        (("--timesteps", "learned"), "has no learned timesteps"),
        (("--weights", "learned"), "has no learned weights"),
    ],
)
def test_bad_options_of_classes(dit_dir, pictures, tmp_path, capsys, arguments, message) -> None:
    common = (pictures[0], "--model", dit_dir, "--out", tmp_path / "run")
    assert_refused(call(capsys, "segment", *common, *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--background",), "--background is for models of classes; .* is one of layouts"),
        (("--timesteps", "learned"), "--timesteps is for models of classes"),
        (("--strategy", "guess"), "guess"),
        (("--classes", "one,two"), "classes"),
    ],
)
def test_bad_options_of_layouts(layout_dir, pictures, tmp_path, capsys, arguments, message) -> None:
    common = (pictures[0], "--model", layout_dir, "--out", tmp_path / "run")
    assert_refused(call(capsys, "segment", *common, *arguments), message)


def test_a_text_model_needs_its_classes(sd, pictures, tmp_path, capsys) -> None:
    common = (pictures[0], "--model", sd, "--out", tmp_path / "run")
    assert_refused(call(capsys, "segment", *common), "classes")
    said = call(capsys, "segment", *common, "--classes", "cat,dog", "--probes", 2, "--background")
    assert said.code == 0
    (record,) = read_records(tmp_path / "run").values()
    assert record["classes"] == ["cat", "dog", "background"]


def test_the_configuration_says_how_many_probes(dit_dir, pictures, tmp_path, capsys) -> None:
    common = (
        pictures[0],
        "--model",
        dit_dir,
        "--classes",
        "star,circle",
        "--out",
        tmp_path / "run",
    )
    assert call(capsys, "segment", *common).code == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    (record,) = read_records(tmp_path / "run").values()
    assert config["probes"] == 64 and record["evaluations"] == 2 * 64
    assert config["classes"] == ["star", "circle"] and config["background"] is False
