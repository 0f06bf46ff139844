"""Data sets of torch, with the attributes of torchvision (which cannot be imported here)."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from dive_fast import DiffusionClassifier
from dive_fast.data import from_torch, select
from dive_fast.data.digits import NAMES, load_digits
from dive_fast.errors import DataError, ImageError
from dive_fast.evaluation import evaluate

CLASSES = ("Dog, hound", "cat")


class Animals(Dataset):
    """Small pictures; counts how many were decoded."""

    classes = ["cat", "dog"]

    def __init__(self, labels: object = (0, 1, 0, 1), attribute: str | None = "targets") -> None:
        self.answers = labels
        self.decoded = 0
        if attribute is not None:
            setattr(self, attribute, labels)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.decoded += 1
        return Image.new("L", (3 + index, 4), index), self.answers[index]


class Broken(Animals):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 2:
            raise OSError("disk\nfull.")
        return super().__getitem__(index)


class TestLabels:
    @pytest.mark.parametrize("attribute", ["targets", "labels", "_labels"])
    @pytest.mark.parametrize(
        "kind", [list, tuple, np.array, torch.tensor, lambda x: [torch.tensor(i) for i in x]]
    )
    def test_from_the_attribute(self, attribute: str, kind) -> None:
        animals = Animals(kind([0, 1, 0, 1]), attribute)
        dataset = from_torch(animals, CLASSES)
        assert dataset.labels.tolist() == [1, 0, 1, 0] and animals.decoded == 0
        assert (dataset.name, dataset.names) == ("Animals", ("cat", "dog"))
        assert list(dataset.ids) == [f"{i:08d}" for i in range(4)]
        assert [e.load().width for e in dataset.examples] == [3, 4, 5, 6]

    def test_of_parts(self) -> None:
        one, two = Animals(), Animals(np.array([1, 1]), "_labels")
        both = Subset(ConcatDataset([one, Subset(two, [1])]), [4, 2, 1])
        dataset = from_torch(both, CLASSES, name="both")
        assert dataset.labels.tolist() == [0, 1, 0] and one.decoded == two.decoded == 0
        assert [e.load().width for e in dataset.examples] == [4, 5, 4]
        assert dataset.names == ("cat", "dog")

    def test_by_loading(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            dataset = from_torch(Animals(attribute=None), CLASSES)
        assert dataset.labels.tolist() == [1, 0, 1, 0]
        assert "Animals: has no list of its labels: all 4 items are loaded" in caplog.text

    def test_a_transform_of_the_labels_counts(self) -> None:
        class Turned(Animals):
            target_transform = staticmethod(lambda label: 1 - label)

            def __getitem__(self, index: int) -> tuple[Image.Image, int]:
                image, label = super().__getitem__(index)
                return image, self.target_transform(label)

        assert from_torch(Turned(), CLASSES).labels.tolist() == [0, 1, 0, 1]

    def test_tensors(self) -> None:
        images = torch.linspace(0, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
        dataset = from_torch(TensorDataset(images, torch.tensor([1, 0])), CLASSES, name="mine")
        assert dataset.labels.tolist() == [1, 0] and dataset.names is None
        torch.testing.assert_close(dataset.examples[1].load(), images[1])


class TestNames:
    def test_synonyms_as_of_imagenet(self) -> None:
        animals = Animals()
        animals.classes = [("cat",), ("Dog", "hound")]
        assert from_torch(animals, CLASSES).labels.tolist() == [1, 0, 1, 0]

    def test_given(self) -> None:
        given = from_torch(Animals(), CLASSES, names=["hound", "Cat"])
        assert given.labels.tolist() == [0, 1, 0, 1]

    def test_rows(self) -> None:
        rows = from_torch(Animals(), ("x", "y"), by_index=True)
        assert rows.labels.tolist() == [0, 1, 0, 1] and rows.names is None


def test_a_bad_picture_is_its_own_error() -> None:
    good, _, bad, _ = from_torch(Broken(), CLASSES).examples
    assert good.load().width == 3
    with pytest.raises(ImageError, match=r"^00000002: cannot be read \(disk full\)\.$"):
        bad.load()


def test_pickle_and_identity() -> None:
    dataset = from_torch(Animals(), CLASSES)
    received = pickle.loads(pickle.dumps(dataset.take([2, 1])))
    assert [e.load().width for e in received.examples] == [5, 4]
    assert from_torch(Animals(), CLASSES).identity() == dataset.identity()
    assert from_torch(Animals((0, 1, 0, 0)), CLASSES).identity() != dataset.identity()


@pytest.mark.parametrize(
    "dataset, names, got",
    [
        (Animals(()), None, "Animals: expected at least one image"),
        (
            Animals((0.5, 1.0)),
            None,
            "expected a whole number as the label of each image, got .*0.5",
        ),
        (Animals((True, False)), None, "expected a whole number"),
        (Animals(([1, 2], [3])), None, r"expected a whole number .* \[1, 2\]"),
        (Animals(("cat", "dog")), None, "expected a whole number .* 'cat'"),
        (Animals((0, -1)), None, "expected labels 0 to 1, which have names, got -1"),
        (Animals(), ["cat", "cow"], "does not know the classes 'cow'"),
        (iter([1]), None, "expected a data set with a length"),
        ([1, 2], None, r"list: expected items \(image, label\), got int"),
        (TensorDataset(torch.zeros(1, 3, 4, 4), torch.tensor([7])), None, "classes 7: .* 0 to 1"),
    ],
)
def test_refused(dataset: object, names: list[str] | None, got: str) -> None:
    with pytest.raises(DataError, match=got):
        from_torch(dataset, CLASSES, names=names)


def test_evaluated(tmp_path: Path) -> None:
    """A real data set through a real model: the answers of the digits as arrays."""
    images, labels = load_digits("test")
    tensors = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    classifier = DiffusionClassifier.from_pretrained("digits", device="cpu")
    data = select(from_torch(tensors, NAMES, name="digits in tensors"), 3, 0)
    summary = evaluate(classifier, data, tmp_path / "run", strategy="enumerate", probes=4)
    assert (summary.n, summary.failed) == (3, 0)
