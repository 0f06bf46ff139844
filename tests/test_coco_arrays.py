"""Damaged archives of boxes: arrays of other kinds, shapes and values."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from command import assert_refused, call

from dive_fast import DataError
from dive_fast.data.coco import read_box_arrays

GOOD = {
    "image_id": np.array([7, 8, 9], dtype=np.int32),
    "width": np.array([100, 60, 50], dtype=np.int16),
    "height": np.array([80, 40, 50], dtype=np.int16),
    "offset": np.array([0, 2, 3, 4], dtype=np.int32),
    "box_xyxy": np.array(
        [[1, 2, 30, 40], [1, 2, 30, 9], [0, 0, 9, 9], [0, 0, 51, 50]], dtype=np.int16
    ),
    "label": np.array([1, 0, 0, 0], dtype=np.int8),
    "suspect_crowd": np.array([0, 0, 0, 1], dtype=np.int8),
    "coco_category_id": np.array([1, 3], dtype=np.int16),
    "names": np.array(["one", "two"]),
    "in_open_test": np.array([False, True, False]),
}


def write(path: Path, **changed: np.ndarray) -> Path:
    buffer = io.BytesIO()
    np.savez(buffer, **{**GOOD, **changed})
    path.write_bytes(buffer.getvalue())
    return path


BOXES = GOOD["box_xyxy"].astype(float)

DAMAGED = {
    "offset as floats": ({"offset": GOOD["offset"].astype(float)}, "offset as whole numbers"),
    "offset falls, unsigned": (
        {"offset": np.array([0, 3, 2, 4], dtype=np.uint8)}, "the boxes of 3 images, offset",
    ),
    "offset below 0": ({"offset": np.array([0, -1, 3, 4])}, "the boxes of 3 images, offset"),
    "labels as text": ({"label": np.array(["one"] * 4)}, "label as whole numbers, got <U3"),
    "labels as floats": ({"label": np.zeros(4)}, "label as whole numbers, got float64"),
    "label beyond": ({"label": np.array([0, 1, 2, 0])}, "label from 0 to 1, got 2"),
    "label below": ({"label": np.array([0, 1, -1, 0])}, "label from 0 to 1, got -1"),
    "objects": ({"label": np.array([0, 1, None, 0], dtype=object)}, "pickled objects"),
    "NaN": ({"box_xyxy": np.where(BOXES == 30, np.nan, BOXES)}, "box_xyxy from .* got nan"),
    "infinite": ({"box_xyxy": np.where(BOXES == 30, np.inf, BOXES)}, "box_xyxy from .* got inf"),
    "boxes as text": ({"box_xyxy": BOXES.astype(str)}, "box_xyxy as numbers, got <U"),
    "complex boxes": ({"box_xyxy": BOXES.astype(complex)}, "box_xyxy as numbers, got complex"),
    "boxes of three": ({"box_xyxy": BOXES[:, :3]}, r"got box_xyxy \[4, 3\]"),
    "fractions": ({"box_xyxy": BOXES / 100}, "box_xyxy in pixels, got fractions"),
    "no width": ({"width": np.array([100, 0, 50])}, "width from 1 to .*, got 0"),
    "width as floats": ({"width": np.array([100.0, np.nan, 50])}, "width as whole numbers, got f"),
    "dates": ({"image_id": np.array([1, 2, 3], dtype="M8[s]")}, "image_id as whole numbers or te"),
    "one number": ({"image_id": np.array(3)}, "the boxes of 1 images"),
    "heights of other images": ({"height": np.array([1, 2])}, r"and height \[2\]"),
    "a table of names": ({"names": np.array([["one"], ["two"]])}, r"and names \[2, 1\]"),
    "names as bytes": ({"names": np.array([b"one", b"two"])}, "names as texts, got .S3"),
    "a name twice": ({"names": np.array(["one", "one"])}, "'one' occurs 2 times"),
    "an image twice": ({"image_id": np.array([7, 8, 7])}, "image id 7 occurs 2 times"),
    "flags of 2": ({"suspect_crowd": np.array([0, 2, 0, 0])}, "suspect_crowd from 0 to 1, got 2"),
    "flags as text": ({"in_open_test": np.array(["no"] * 3)}, "in_open_test as 0 or 1, got <U2"),
    "nothing to learn from": ({"in_open_test": np.ones(3, dtype=bool)}, "got none of 4"),
    "no size": ({"box_xyxy": BOXES[:, [2, 3, 0, 1]]}, "boxes of some size .* got none of 4"),
    "empty": ({name: array[:0] for name, array in GOOD.items()}, "the boxes of 0 images"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case: str, tmp_path: Path) -> None:
    changed, message = DAMAGED[case]
    with pytest.raises(DataError, match=message) as refused:
        read_box_arrays(write(tmp_path / "boxes.npz", **changed))
    assert "boxes.npz: " in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int64, np.uint64])
def test_whole_numbers_of_any_size(kind: type, tmp_path: Path) -> None:
    """Unsigned ones, too, whose differences wrap around."""
    changed = {name: a.astype(kind) for name, a in GOOD.items() if a.dtype.kind == "i"}
    data = read_box_arrays(write(tmp_path / "boxes.npz", **changed))
    assert [image.boxes.tolist() for image in data.images] == [
        [[1, 2, 30, 40], [1, 2, 30, 9]], [[0, 0, 50, 50]],
    ]  # fmt: skip
    assert [image.id for image in data.images] == [7, 9]
    assert [image.class_ids.tolist() for image in data.images] == [[1, 0], [0]]


def test_ids_as_text(tmp_path: Path) -> None:
    data = read_box_arrays(write(tmp_path / "boxes.npz", image_id=np.array(["a", "b", "c"])))
    assert [image.id for image in data.images] == ["a", "c"]


def test_the_command_refuses(layout_dir: Path, tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "boxes.npz", label=np.zeros(4))
    arguments = ("--annotations", path, "--model", layout_dir, "--out", tmp_path / "prior")
    assert_refused(call(capsys, "train-prior", *arguments), "label as whole numbers, got float64")
