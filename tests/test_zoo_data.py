"""The files that MNIST's and Omniglot's models are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dive_fast.data import open_dataset
from dive_fast.data.images import as_images
from dive_fast.data.mnist import load_mnist
from dive_fast.data.omniglot import load_omniglot
from dive_fast.errors import DataError
from dive_fast.training.dit import OMNIGLOT, augment_images

RNG = np.random.default_rng(0)


def write_mnist(path: Path, **changes) -> Path:
    arrays = {
        "x_train": RNG.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        "y_train": np.arange(6, dtype=np.uint8),
        "x_test": RNG.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "y_test": np.array([7, 8, 9], dtype=np.uint8),
    }
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def write_omniglot(path: Path, **changes) -> Path:
    arrays = {
        "x": RNG.integers(0, 256, (40, 32, 32), dtype=np.uint8),
        "y": np.repeat(np.arange(2, dtype=np.int16), 20),
        "drawer": np.tile(np.arange(1, 21), 2),
        "classes": np.array(["Greek/alpha", "Greek/beta"]),
    }
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def test_mnist_has_its_official_split(tmp_path: Path) -> None:
    path = write_mnist(tmp_path / "mnist.npz")
    train, test = load_mnist(path, "train"), load_mnist(path, "test")
    assert (len(train.images), len(test.images)) == (6, 3)
    assert test.labels.tolist() == [7, 8, 9] and test.labels.dtype == np.int64
    assert test.names[7] == "seven"


def test_omniglot_is_split_by_drawer(tmp_path: Path) -> None:
    path = write_omniglot(tmp_path / "omniglot.npz")
    train, test = load_omniglot(path, "train"), load_omniglot(path, "test")
    assert train.labels.tolist() == [0] * 15 + [1] * 15
    assert test.labels.tolist() == [0] * 5 + [1] * 5
    both = np.load(path)
    np.testing.assert_array_equal(test.images, both["x"][both["drawer"] > 15])
    assert test.names == ("Greek/alpha", "Greek/beta")


def test_evaluation_takes_only_the_held_out_drawers(tmp_path: Path) -> None:
    path = write_omniglot(tmp_path / "omniglot.npz")
    data = open_dataset(path, ("Greek/alpha", "Greek/beta"))
    assert [example.label for example in data.examples] == [0] * 5 + [1] * 5
    held_out = load_omniglot(path, "test").images
    np.testing.assert_array_equal(data.examples[3].load(), held_out[3])


def test_training_sees_pictures_halved_as_classification_does() -> None:
    """A mean over 2 x 2 pixels; Pillow rounds to 8 bits after each direction."""
    import torch
    import torch.nn.functional as F

    picture = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
    trained = F.avg_pool2d(torch.from_numpy(picture)[None].float() / 127.5 - 1, 2)
    (seen,) = as_images(picture, 16, 1)
    torch.testing.assert_close(trained, seen, atol=1.01 / 127.5, rtol=0)


def test_augmentation_keeps_the_ground_and_moves_the_ink() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    blank = -torch.ones(8, 1, 32, 32)
    torch.testing.assert_close(augment_images(blank, OMNIGLOT, generator), blank)
    stroke = blank.clone()
    stroke[:, :, 8:24, 15:17] = 1
    moved = augment_images(stroke, OMNIGLOT, generator)
    assert moved.min() >= -1 and moved.max() <= 1
    assert all(not torch.equal(a, b) for a, b in zip(moved, stroke, strict=True))
    # Ink is kept, up to the scaling of both sides by at most 12% and the shear.
    ink = (moved + 1).sum(dim=(1, 2, 3)) / (stroke + 1).sum(dim=(1, 2, 3))
    assert ink.min() > 0.7 and ink.max() < 1.4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": None}, "expected the arrays x_train and y_train, got"),
        ({"x_train": np.zeros((6, 20, 20), np.uint8)}, r"x_train as uint8 \[N, 28, 28\], got"),
        ({"x_train": np.zeros((6, 28, 28))}, r"x_train as uint8 \[N, 28, 28\], got float64"),
        ({"y_train": np.arange(5)}, r"y_train as whole numbers \[6\], got int64 \[5\]"),
        ({"y_train": np.zeros(6)}, r"y_train as whole numbers \[6\], got float64"),
    ],
)
def test_bad_mnist(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_mnist(write_mnist(tmp_path / "bad.npz", **changes), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drawer": None}, "expected the arrays x, y, drawer and classes, got"),
        ({"drawer": np.arange(3)}, "expected a drawer per image, got 3"),
        ({"classes": np.array(["one"])}, "expected labels below 1, got 1"),
        ({"classes": np.array(["one", " "])}, "a name of every class, got an empty one of 1"),
        ({"classes": np.arange(2)}, r"expected classes as texts \[C\], got int64 \[2\]"),
        ({"classes": np.array([["one", "two"]])}, r"classes as texts \[C\], got <U3 \[1, 2\]"),
    ],
)
def test_bad_omniglot(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_omniglot(write_omniglot(tmp_path / "bad.npz", **changes), "train")


def test_no_file_and_no_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is there"):
        load_mnist(tmp_path / "missing.npz", "train")
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="expected an .npz archive of plain arrays"):
        load_mnist(tmp_path / "bad.npz", "train")
