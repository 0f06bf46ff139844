"""Training on annotated images: flips, what is left out, and the model that comes out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Said, assert_refused, call
from PIL import Image

from dive_fast import LayoutDetector
from dive_fast.core.layouts import Layout, LayoutFormat
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.errors import DataError, RunError
from dive_fast.models import load_model
from dive_fast.training.annotated import (
    ANNOTATED,
    LEFT_RIGHT,
    MOST_OFTEN,
    UP_DOWN,
    chances,
    config_of_size,
    draw_flipped,
    flip,
    train_annotated,
)

FORM = LayoutFormat.compact(("cat", "dog"), max_objects=3, grid=9)
TINY = dataclasses.replace(
    ANNOTATED,
    sample_size=16,
    patch_size=8,
    channels=16,
    layers=1,
    heads=2,
    width=8,
    encoder_heads=1,
    steps=3,
    batch_size=4,
    warmup_steps=1,
)


def write_data(folder: Path, n: int = 5) -> Path:
    """n images of 24 x 20, a cat in each and a dog in the even ones; the second is missing."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    boxes = []
    for i in range(n):
        if i != 1:
            pixels = rng.integers(256, size=(20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        boxes.append({"image_id": i, "category_id": 1, "bbox": [2, 4, 12, 10]})
        if i % 2 == 0:
            boxes.append({"image_id": i, "category_id": 2, "bbox": [10, 4, 9, 12]})
    boxes.append({"image_id": 0, "category_id": 1, "bbox": [2, 4, 0, 10]})
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 24, "height": 20} for i in range(n)],
        "annotations": [{"id": i, **box} for i, box in enumerate(boxes)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def assert_stopped(said: Said, message: str) -> None:
    """Exit code 2, and one sentence, after those on what was left out of the data."""
    assert said.code == 2 and message in said.err.splitlines()[-1], said


@pytest.mark.parametrize("axis", [UP_DOWN, LEFT_RIGHT])
def test_flipped_layouts_are_those_of_flipped_pictures(axis: int) -> None:
    boxes = torch.tensor([[0.125, 0.25, 0.5, 0.375], [0.0, 0.5, 1.0, 1.0]])
    layout = Layout(boxes, torch.tensor([1, 0]))
    tokens = torch.stack(
        [FORM.encode(layout), FORM.encode(Layout(boxes[:0], layout.class_ids[:0]))]
    )
    flipped = flip(tokens, FORM, axis)
    low, high = (1, 3) if axis == UP_DOWN else (0, 2)
    expected = boxes.clone()
    expected[:, low], expected[:, high] = 1 - boxes[:, high], 1 - boxes[:, low]
    found = FORM.decode(flipped[0])
    assert torch.equal(found.boxes, expected) and torch.equal(found.class_ids, layout.class_ids)
    assert torch.equal(flipped[1], tokens[1])  # nothing stays nothing
    assert torch.equal(flip(flipped, FORM, axis), tokens)


def test_batches_are_of_the_chosen_pictures_and_their_boxes_follow_them() -> None:
    """A bright rectangle is where its box says, in every batch."""
    pictures = torch.zeros(3, 1, 16, 16, dtype=torch.uint8)
    boxes = torch.tensor([[2, 4, 6, 8], [0, 0, 8, 2], [10, 6, 16, 16]])
    tokens = []
    for picture, box in zip(pictures, boxes.tolist(), strict=True):
        picture[0, box[1] : box[3], box[0] : box[2]] = 255
        tokens.append(FORM.encode(Layout(torch.tensor([box]) / 16, torch.tensor([0]))))
    draw = draw_flipped(pictures, torch.stack(tokens), torch.tensor([0, 2]), FORM, TINY)
    seen = set()
    for step in range(12):
        batch, found = draw(step)
        assert batch.shape == (4, 1, 16, 16) and batch.dtype == torch.uint8
        for picture, row in zip(batch, found, strict=True):
            x0, y0, x1, y1 = (FORM.decode(row).boxes[0] * 16).int().tolist()
            expected = torch.zeros(16, 16, dtype=torch.uint8)
            expected[y0:y1, x0:x1] = 255
            assert torch.equal(picture[0], expected)
            seen.add((x0, y0, x1, y1))
    assert not pictures[1, 0, 2:].any() and pictures[0, 0, 4, 2] == 255  # as they were
    assert len(seen) == 8  # four flips of each of two images, none of the one left out
    again, _ = draw(3)
    assert torch.equal(again, draw(3)[0])


def test_end_to_end(tmp_path: Path, capsys) -> None:
    annotations, out = write_data(tmp_path), tmp_path / "model"
    arguments = ["--annotations", annotations, "--images", tmp_path / "pictures", "--out", out]
    sizes = ["--size", 16, "--patch-size", 8, "--channels", 16, "--layers", 1, "--batch-size", 2]
    said = call(
        capsys, "train-layout", *arguments, *sizes, "--steps", 2, "--max-objects", 1, "--bf16"
    )
    assert said.code == 0 and "learned from 3" in said.out
    assert "expected a box of some size, got 0 x 10" in said.err
    assert "beyond the 1 largest of an image: 3" in said.err
    model = load_model(out)
    assert model.layout_format.names == ("cat", "dog") and model.layout_format.max_objects == 1
    assert model.layout_format.grid == 9 and model.image_shape == (3, 16, 16)
    facts = json.loads((out / "dive_fast.json").read_text())
    assert (facts["config"]["steps"], facts["config"]["bf16"]) == (2, True)
    assert facts["expected"]["layout"] > 0
    detector = LayoutDetector.from_pretrained(out)
    identity = detector.identity()
    assert identity["timesteps"] == facts["timesteps"]
    t = TimestepWeights.from_dict(facts["timesteps"]).probes(40, (3, 16, 16)).timesteps
    low, high = (1000 * share for share in config_of_size(16).t_range)
    assert low - 25 <= t.min() and t.max() < high + 25  # whole bins
    assert model.schedule.target == "sample"
    assert facts["held_out"] in ([0], [2], [3], [4])
    assert "margin and beta are not fitted (expected two held-out images" in said.err
    assert_stopped(call(capsys, "train-layout", *arguments), "holds a model already")


def test_rare_classes_come_more_often() -> None:
    """By hand: cats in 4 of 5 images, dogs in 1, so sqrt(4 / 1) = 2 times as often."""
    cat, dog = torch.tensor([[0.0, 0.0, 0.5, 0.5]]), torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    with_cat = FORM.encode(Layout(cat, torch.tensor([0])))
    both = FORM.encode(Layout(torch.cat([dog, cat]), torch.tensor([1, 0])))
    nothing = FORM.encode(Layout(cat[:0], torch.tensor([]).long()))
    tokens = torch.stack([with_cat, with_cat, both, with_cat, nothing])
    assert torch.allclose(chances(tokens, FORM), torch.tensor([1, 1, 2, 1, 1]).double() / 6)
    rarest = torch.stack([with_cat] * 99 + [both])
    assert chances(rarest, FORM)[-1] * (99 + MOST_OFTEN) == pytest.approx(MOST_OFTEN)
    assert torch.allclose(
        chances(torch.stack([nothing] * 4), FORM), torch.full((4,), 0.25).double()
    )


def test_timesteps_follow_the_size() -> None:
    """Twice the side: four times the area, a quarter of the SNR."""
    assert config_of_size(32) == ANNOTATED
    larger = config_of_size(64)
    assert larger.sample_size == 64 and larger.max_weight == 4 * ANNOTATED.max_weight
    alpha_bar = ANNOTATED.scheduler().alphas_cumprod
    snr = alpha_bar / (1 - alpha_bar)
    for before, after in zip(ANNOTATED.t_range, larger.t_range, strict=True):
        ratio = snr[round(1000 * before)] / snr[round(1000 * after)]
        assert float(ratio) == pytest.approx(4.0, rel=0.02)


def test_too_few_pictures(tmp_path: Path) -> None:
    annotations = write_data(tmp_path, n=1)
    with pytest.raises(DataError, match="expected at least 2 images to learn from, got 1"):
        train_annotated(
            annotations, tmp_path / "pictures", tmp_path / "out", max_objects=2, tell=lambda s: s
        )
    assert not (tmp_path / "out").exists()


def test_pictures_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    """As if they were missing; the rest is learned with its own layouts."""
    annotations, said = write_data(tmp_path, n=6), []
    (tmp_path / "pictures" / "3.png").write_bytes(b"no image")
    Image.new("RGB", (3, 3)).save(tmp_path / "pictures" / "4.png")
    trained = train_annotated(
        annotations,
        tmp_path / "pictures",
        tmp_path / "out",
        max_objects=2,
        config=TINY,
        progress=False,
        tell=said.append,
    )
    assert (trained.n_train, trained.n_held_out) == (2, 1)
    assert sum("left out: " in sentence for sentence in said) == 2
    for name in ("0", "2", "5"):
        (tmp_path / "pictures" / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="expected at least 2 images to learn from, got 0"):
        train_annotated(
            annotations,
            tmp_path / "pictures",
            tmp_path / "none",
            max_objects=2,
            config=TINY,
            tell=said.append,
        )


def test_other_data_are_not_resumed(tmp_path: Path) -> None:
    """Another number of slots, another box, a class of another name."""
    annotations, out = write_data(tmp_path), tmp_path / "out"

    def train(most: int) -> None:
        train_annotated(
            annotations,
            tmp_path / "pictures",
            out,
            max_objects=most,
            config=TINY,
            progress=False,
            tell=lambda sentence: None,
        )

    train(2)
    for name in ("dive_fast.json", "model_index.json"):  # as if it had been cut off
        (out / name).unlink()
    with pytest.raises(RunError, match="or other data"):
        train(3)
    text = annotations.read_text()
    annotations.write_text(text.replace("[2, 4, 12, 10]", "[2, 4, 12, 8]"))
    with pytest.raises(RunError, match="or other data"):
        train(2)
    annotations.write_text(text.replace('"cat"', '"horse"'))
    with pytest.raises(RunError, match="or other data"):
        train(2)


def test_bad_input(tmp_path: Path, capsys) -> None:
    annotations = write_data(tmp_path)
    call_with = {"--annotations": annotations, "--images": tmp_path / "pictures"}
    for changes, message in (
        ({"--annotations": tmp_path / "none.json"}, "none.json"),
        ({"--images": tmp_path / "nowhere"}, "nowhere"),
        ({"--patch-size": 5}, "a sample_size that 5 divides, got 64"),
        ({"--channels": 18}, "channels that 4 and 4 heads divide, got 18"),
        ({"--size": 0}, "--size"),
        ({"--size": 7}, "expected an even number of pixels as size, got 7"),
    ):
        options = {**call_with, "--out": tmp_path / "out", **changes}
        arguments = [part for pair in options.items() for part in pair]
        assert_stopped(call(capsys, "train-layout", *arguments), message)


def test_a_device_that_is_not_there(tmp_path: Path, capsys) -> None:
    """Asked before anything is read or written."""
    out = tmp_path / "model"
    for command, arguments in (
        ("train-layout", ["--annotations", "none.json", "--images", tmp_path]),
        ("train-classes", ["--data", tmp_path]),
    ):
        said = call(capsys, command, *arguments, "--out", out, "--device", "nowhere")
        assert_refused(said, "the device 'nowhere' cannot be used")
    assert not out.exists()
