"""The zoo's scenes: tight boxes on the grid, fixed seeds, structure, and their COCO form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dive_fast.core.layouts import Layout
from dive_fast.data import scenes
from dive_fast.data.scenes import SceneMaker, Scenes, load_masks, load_scenes, write_scenes
from dive_fast.errors import DataError
from dive_fast.training.scenes import SCENES_FORMAT, scene_tokens


@pytest.fixture(scope="module")
def test_part() -> Scenes:
    return load_scenes("test", 200)


@pytest.fixture(scope="module")
def train_part() -> Scenes:
    return SceneMaker("train")(1500, seed=0)


def test_boxes_lie_on_the_grid(test_part: Scenes) -> None:
    there = test_part.class_ids >= 0
    boxes = test_part.boxes[there]
    assert test_part.images.dtype == np.uint8 and test_part.images.shape == (200, 32, 32)
    assert (boxes % scenes.STEP == 0).all() and boxes.min() >= 0 and boxes.max() <= scenes.CANVAS
    heights = boxes[:, 3] - boxes[:, 1]
    assert heights.min() >= scenes.SMALLEST and heights.max() <= scenes.LARGEST
    assert (boxes[:, 2] > boxes[:, 0]).all()
    assert (test_part.boxes[~there] == 0).all()
    # Present objects stand first.
    assert (there.argmin(axis=1) == test_part.counts)[test_part.counts < 4].all()


def test_boxes_are_tight_and_hold_all_ink(test_part: Scenes) -> None:
    for image, boxes, count in zip(
        test_part.images, test_part.boxes, test_part.counts, strict=True
    ):
        outside = np.ones(image.shape, dtype=bool)
        for left, top, right, bottom in boxes[:count]:
            outside[top:bottom, left:right] = False
            # In each of the border's four lines some pixel is well above the ground.
            inside = image[top:bottom, left:right]
            lines = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert min(line.max() for line in lines) > 20
        assert (image[outside] == 0).all()


@pytest.mark.parametrize("part", ["train", "test"])
def test_masks_are_the_ink_within_the_boxes(part: str) -> None:
    made, masks = load_scenes(part, 60), load_masks(part, 60)
    assert masks.shape == (60, 32, 32) and masks.dtype == np.int64
    for image, boxes, ids, mask in zip(made.images, made.boxes, made.class_ids, masks, strict=True):
        outside = np.ones(image.shape, dtype=bool)
        for (left, top, right, bottom), c in zip(boxes, ids, strict=True):
            if c >= 0:
                outside[top:bottom, left:right] = False
                inside = mask[top:bottom, left:right]
                assert 0.15 < (inside == c).mean() <= 1
        assert (mask[outside] == len(scenes.NAMES)).all()
        assert set(np.unique(mask)) == {*ids[ids >= 0], len(scenes.NAMES)}
        # Lights are 0.75 to 1, so a fifth of a digit's ink is 0.15 to 0.2 of white.
        assert image[mask < len(scenes.NAMES)].min(initial=255) >= 0.1 * 255
        assert image[mask == len(scenes.NAMES)].max() <= 0.2 * 255 + 1


def test_masks_need_a_scene() -> None:
    with pytest.raises(DataError, match="at least 1 scene, got 0"):
        load_masks("test", 0)


def test_only_training_scenes_may_be_empty(test_part: Scenes, train_part: Scenes) -> None:
    assert set(test_part.counts.tolist()) == {1, 2, 3, 4}
    assert set(train_part.counts.tolist()) == {0, 1, 2, 3, 4}
    empty = train_part.counts == 0
    assert 0.015 < empty.mean() < 0.05  # of 3%, four standard deviations either way
    assert (train_part.images[empty] == 0).all()
    assert (train_part.images[~empty].max(axis=(1, 2)) > 100).all()


def test_a_batch_of_empty_scenes() -> None:
    make = SceneMaker("train")
    seed = next(seed for seed in range(1000) if make(1, seed).counts[0] == 0)
    alone = make(1, seed)
    assert alone.images.dtype == np.uint8 and alone.images.shape == (1, 32, 32)
    assert (alone.class_ids == -1).all()


def test_seeds(train_part: Scenes) -> None:
    make = SceneMaker("train")
    for again, array in zip(make(1500, seed=0), train_part, strict=True):
        assert np.array_equal(again, array)
    assert not np.array_equal(make(20, seed=1).images, train_part.images[:20])
    boxes, class_ids = make.layouts(1500, seed=0)
    assert np.array_equal(boxes, train_part.boxes)
    assert np.array_equal(class_ids, train_part.class_ids)


def test_the_list_is_fixed(test_part: Scenes) -> None:
    """A shorter list begins a longer one, and the first scenes are the ones of every release."""
    for short, long in zip(load_scenes("test", 3), test_part, strict=True):
        assert np.array_equal(short, long[:3])
    assert test_part.class_ids[:3].tolist() == [[0, 1, 2, -1], [7, 8, 8, 2], [0, -1, -1, -1]]
    first = [[14, 6, 22, 16], [22, 6, 28, 16], [14, 18, 26, 32], [0, 0, 0, 0]]
    assert test_part.boxes[0].tolist() == first


def test_digits_like_company(train_part: Scenes) -> None:
    """The next digit stands to the right far more often than the tenth of the time."""
    several = train_part.class_ids[train_part.counts > 1]
    follows = (several[:, 1] - several[:, 0]) % 10 == 1
    assert 0.3 < follows.mean() < 0.55


def test_rows(train_part: Scenes) -> None:
    pairs = train_part.boxes[train_part.counts > 1]
    one_line = (pairs[:, 0, 1] == pairs[:, 1, 1]) & (pairs[:, 0, 3] == pairs[:, 1, 3])
    assert 0.6 < one_line.mean() < 0.9


def test_tokens_are_those_of_the_format(train_part: Scenes) -> None:
    part = Scenes(*(array[:100] for array in train_part))
    tokens = scene_tokens(part.boxes, part.class_ids)
    for row, boxes, ids, count in zip(tokens, part.boxes, part.class_ids, part.counts, strict=True):
        layout = Layout(
            boxes=torch.tensor(boxes[:count] / scenes.CANVAS, dtype=torch.float32).view(-1, 4),
            class_ids=torch.tensor(ids[:count]),
        )
        assert torch.equal(row, SCENES_FORMAT.encode(layout))


@pytest.mark.parametrize("part", ["val", ""])
def test_unknown_part(part: str) -> None:
    with pytest.raises(DataError, match=f"the parts 'train' and 'test', got '{part}'"):
        load_scenes(part)


def test_no_scenes() -> None:
    with pytest.raises(DataError, match="expected at least 1 scene, got 0"):
        load_scenes("test", 0)
    with pytest.raises(DataError, match="expected at least 1 scene, got -1"):
        SceneMaker("train")(-1, seed=0)


class TestCoco:
    @pytest.mark.parametrize("part", ["test", "train"])
    def test_what_is_written_is_read_back(self, part: str, tmp_path: Path) -> None:
        """Boxes and classes to the last digit, images to the last pixel; empty scenes too."""
        made = load_scenes(part, 40)
        assert (made.counts == 0).any() == (part == "train")
        data = write_scenes(tmp_path / "scenes", part, 40)
        assert data.problems == () and data.names == scenes.NAMES
        assert [image.id for image in data.images] == list(range(1, 41))
        for i, image in enumerate(data.images):
            count = made.counts[i]
            assert np.array_equal(np.asarray(image.read()), made.images[i])
            assert np.array_equal(image.boxes.numpy(), made.boxes[i, :count])
            assert np.array_equal(image.class_ids.numpy(), made.class_ids[i, :count])
            assert not image.crowd.any()

    def test_written_again(self, tmp_path: Path) -> None:
        """A run that resumes sees the same data."""
        first = write_scenes(tmp_path, n=5).identity()
        assert write_scenes(tmp_path, n=5).identity() == first
        assert write_scenes(tmp_path, n=6).identity() != first

    def test_the_folder_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="file: the scenes cannot be written"):
            write_scenes(tmp_path / "file", n=1)
