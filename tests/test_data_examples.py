"""Examples are made when they are asked for; ids, labels and fingerprints stay what they were."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dive_fast.data import DataSet, Example, open_dataset, select
from dive_fast.data.digits import NAMES

CLASSES = ("tench", "goldfish")


def save_folder(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (4 + i % 3, 5), 10 * i % 256).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "pictures", {"goldfish": 3, "tench": 4})


class TestExamples:
    def test_ids_and_labels_in_bulk(self, folder: Path) -> None:
        dataset = open_dataset(folder, CLASSES)
        assert list(dataset.ids) == [e.id for e in dataset.examples]
        assert dataset.labels.tolist() == [1, 1, 1, 0, 0, 0, 0]
        assert dataset.labels.dtype == np.int64

    def test_index_slice_and_iteration_agree(self, folder: Path) -> None:
        examples = open_dataset(folder, CLASSES).examples
        whole = list(examples)
        assert len(examples) == len(whole) == 7
        assert [examples[i].id for i in range(-7, 7)] == [e.id for e in whole * 2]
        assert [e.id for e in examples[1:6:2]] == [e.id for e in whole[1:6:2]]
        assert examples[np.int64(2)].id == whole[2].id
        assert [examples[4].load().size, examples[4].facts] == [whole[4].load().size, {}]
        for beyond in (7, -8):
            with pytest.raises(IndexError):
                examples[beyond]

    def test_an_example_is_not_kept(self, folder: Path) -> None:
        examples = open_dataset(folder, CLASSES).examples
        assert examples[0] is not examples[0]

    def test_facts_of_ones_own(self) -> None:
        load = np.zeros((3, 3), np.uint8).copy
        assert Example("0", 0, load).facts == {}
        assert Example("0", 0, load, {"site": "north"}).facts["site"] == "north"


class TestTake:
    def test_order_of_the_positions_and_again(self) -> None:
        dataset = open_dataset("digits", NAMES)
        taken = dataset.take([5, 300, 2])
        again = taken.take(np.array([2, 0]))
        assert list(again.ids) == ["000002", "000005"]
        assert again.labels.tolist() == dataset.labels[[2, 5]].tolist()
        for example, position in zip(again.examples, (2, 5), strict=True):
            np.testing.assert_array_equal(example.load(), dataset.examples[position].load())
        assert (again.name, again.names) == (dataset.name, dataset.names)

    def test_nothing(self) -> None:
        empty = open_dataset("digits", NAMES).take([])
        assert len(empty.examples) == 0 and list(empty.ids) == [] and empty.labels.shape == (0,)
        assert empty.identity()["count"] == 0

    def test_of_a_plain_list(self) -> None:
        examples = [Example(str(i), i, np.zeros((2, 2), np.uint8).copy) for i in range(4)]
        taken = DataSet("mine", examples, None).take([3, 1])
        assert taken.ids == ["3", "1"] and taken.labels.tolist() == [3, 1]

    def test_no_such_position(self) -> None:
        with pytest.raises(IndexError):
            open_dataset("digits", NAMES).take([397])


class TestPickle:
    def test_folder(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Read in a process that works elsewhere."""
        monkeypatch.chdir(tmp_path)
        sent = pickle.dumps(select(open_dataset("pictures", CLASSES), 5, 0))
        monkeypatch.chdir(os.sep)
        received = pickle.loads(sent)
        assert [e.load().size[1] for e in received.examples] == [5] * 5

    def test_bytes_per_image_of_a_folder(self, tmp_path: Path) -> None:
        sizes = [
            len(pickle.dumps(open_dataset(save_folder(tmp_path / str(n), {"tench": n}), CLASSES)))
            for n in (10, 110)
        ]
        assert (sizes[1] - sizes[0]) / 100 < 40  # id "tench/000.png", label int64

    def test_arrays_once(self) -> None:
        dataset = open_dataset("digits", NAMES)
        pixels = 397 * 8 * 8
        sent = pickle.dumps(dataset)
        assert pixels < len(sent) < pixels + 397 * 40
        np.testing.assert_array_equal(
            pickle.loads(sent).examples[9].load(), dataset.examples[9].load()
        )


class TestFingerprint:
    """Runs go on only where these are what earlier versions wrote."""

    def test_digits(self) -> None:
        dataset = open_dataset("digits", NAMES)
        assert dataset.identity()["fingerprint"] == "ceaa90e866355b18"
        assert select(dataset, 7, 3).identity()["fingerprint"] == "692a932ea5ff12c3"

    def test_folder(self, tmp_path: Path) -> None:
        save_folder(tmp_path / 'thé "1"', {"": 2})
        (tmp_path / 'thé "1"' / "gone.png").symlink_to(tmp_path / "nowhere.png")
        ids = [f'thé "1"/{name}.png' for name in ("000", "001", "gone")]
        sizes = [(tmp_path / ids[0]).stat().st_size, (tmp_path / ids[1]).stat().st_size, None]
        content = json.dumps(list(zip(ids, sizes, strict=True)))
        chosen = [hashlib.sha256(content.encode()).hexdigest(), [(name, 1) for name in ids]]
        expected = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]
        identity = open_dataset(tmp_path, ("thé", 'thé "1"')).identity()
        assert identity == {"source": tmp_path.name, "count": 3, "fingerprint": expected}
