from __future__ import annotations

import json
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dive_fast.data import DataSet, folder_classes, open_dataset, select
from dive_fast.data.digits import NAMES, load_digits
from dive_fast.data.images import as_images
from dive_fast.errors import DataError, ImageError

RNG = np.random.default_rng(0)
CLASSES = ("tench, Tinca tinca", "Goldfish", "crane", "crane", "great white shark, white shark")


def save_folder(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(RNG.integers(0, 256, (8, 8), np.uint8)).save(root / name / f"{i}.png")
    return root


def save_npz(path: Path, **arrays: object) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def pixels(n: int, *rest: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, *(rest or (8, 8))), np.uint8)


class TestDigits:
    @pytest.mark.parametrize(
        "class_names", [NAMES, tuple(n.upper() for n in NAMES), tuple("0123456789")]
    )
    def test_held_out_part(self, class_names: tuple[str, ...]) -> None:
        dataset = open_dataset("digits", class_names)
        images, labels = load_digits("test")
        assert len(dataset.examples) == 397 and dataset.names == NAMES
        assert [e.label for e in dataset.examples] == labels.tolist()
        np.testing.assert_array_equal(np.stack([e.load() for e in dataset.examples]), images)
        assert len({e.id for e in dataset.examples}) == 397

    def test_labels_follow_the_models_order(self) -> None:
        dataset = open_dataset("digits", NAMES[::-1])
        assert [e.label for e in dataset.examples] == (9 - load_digits("test").labels).tolist()

    @pytest.mark.parametrize("class_names", [CLASSES, NAMES[:8], tuple("abcdefghij")])
    def test_model_of_something_else(self, class_names: tuple[str, ...]) -> None:
        with pytest.raises(DataError, match="digits: the model does not know the classes '"):
            open_dataset("digits", class_names)


class TestFolder:
    @pytest.mark.parametrize(
        "name, label",
        [
            ("tench, Tinca tinca", 0),
            ("tinca TINCA", 0),
            ("TENCH", 0),
            ("goldfish", 1),
            ("white shark", 4),
            ("2", 2),
            ("0003", 3),
        ],
    )
    def test_class_of_a_folder(self, tmp_path: Path, name: str, label: int) -> None:
        dataset = open_dataset(str(save_folder(tmp_path, {name: 2})), CLASSES)
        assert [e.label for e in dataset.examples] == [label, label]
        assert dataset.names == (name,)

    def test_a_name_goes_before_an_index(self, tmp_path: Path) -> None:
        dataset = open_dataset(save_folder(tmp_path, {"1": 1, "0": 1}), ("1", "0"))
        assert [(e.id, e.label) for e in dataset.examples] == [("0/0.png", 1), ("1/0.png", 0)]

    def test_a_whole_name_goes_before_a_synonym(self, tmp_path: Path) -> None:
        names = ("projectile, missile", "missile")
        (example,) = open_dataset(save_folder(tmp_path, {"missile": 1}), names).examples
        assert example.label == 1

    def test_pictures_at_any_depth_in_order(self, tmp_path: Path) -> None:
        save_folder(tmp_path, {"tench": 2, "goldfish/inner": 1, ".cache": 1})
        (tmp_path / "tench" / "notes.txt").write_text("no image")
        dataset = open_dataset(tmp_path, CLASSES)
        ids = [e.id for e in dataset.examples]
        assert ids == ["goldfish/inner/0.png", "tench/0.png", "tench/1.png"]
        with Image.open(tmp_path / ids[0]) as image:
            np.testing.assert_array_equal(np.asarray(dataset.examples[0].load()), np.asarray(image))

    def test_a_bad_picture_is_its_own_error(self, tmp_path: Path) -> None:
        save_folder(tmp_path, {"tench": 1})
        (tmp_path / "tench" / "bad.png").write_bytes(b"not an image")
        (tmp_path / "tench" / "dangling.png").symlink_to(tmp_path / "gone.png")
        good, bad, dangling = open_dataset(tmp_path, CLASSES).examples
        assert np.asarray(good.load()).shape == (8, 8)
        for example in (bad, dangling):
            with pytest.raises(ImageError, match=example.id):
                example.load()

    @pytest.mark.parametrize(
        "name",
        ["traffic_light", "Traffic-Light", "traffic light", "TRAFFIC  LIGHT", "stop_light"],
    )
    def test_underscores_hyphens_and_blanks_are_alike(self, tmp_path: Path, name: str) -> None:
        names = ("cat", "traffic light, stop light", "light")
        (example,) = open_dataset(save_folder(tmp_path, {name: 1}), names).examples
        assert example.label == 1

    @pytest.mark.parametrize(
        "name, label", [("a-b", 1), ("a b", 0), ("A B", 0), ("A-B", 1), ("-", 2), ("_", 3)]
    )
    def test_the_closest_spelling_decides(self, tmp_path: Path, name: str, label: int) -> None:
        (example,) = open_dataset(
            save_folder(tmp_path, {name: 1}), ("a b", "a-b", "-", "_")
        ).examples
        assert example.label == label

    def test_several_spellings_are_ambiguous(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="'a_b' could be any of the model's classes 0, 1: name"):
            open_dataset(save_folder(tmp_path, {"a_b": 1}), ("a b", "a-b"))

    @pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
    def test_letters_with_accents_in_either_form(self, tmp_path: Path, forms) -> None:
        """macOS takes them apart in file names."""
        folder, asked = (unicodedata.normalize(form, "café") for form in forms)
        assert folder != asked
        save_folder(tmp_path, {folder: 1})
        (example,) = open_dataset(tmp_path, ("thé", asked)).examples
        assert example.label == 1
        assert folder_classes(tmp_path) == [unicodedata.normalize("NFC", asked)]

    def test_a_name_that_two_classes_share(self, tmp_path: Path) -> None:
        names = ("crane (0)", "cat", "crane (2)")
        with pytest.raises(
            DataError, match="'crane' could be any of .* 0, 2: name it by its index"
        ):
            open_dataset(save_folder(tmp_path / "a", {"crane": 1}), names)
        save_folder(tmp_path / "b", {"crane (2)": 1, "0": 1})
        assert [e.label for e in open_dataset(tmp_path / "b", names).examples] == [0, 2]

    def test_service_folders_are_no_classes(self, tmp_path: Path, caplog) -> None:
        save_folder(tmp_path, {"tench": 1, "__MACOSX": 1, ".ipynb_checkpoints": 1, "@eaDir": 1})
        (tmp_path / "README.md").touch()
        (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
        (tmp_path / "tench" / "labels.csv").touch()
        dataset = open_dataset(tmp_path, CLASSES)
        assert [e.id for e in dataset.examples] == ["tench/0.png"]
        assert folder_classes(tmp_path) == ["tench"]
        (line,) = caplog.messages
        for part in (
            "1 without an image's suffix (.csv)",
            "2 the system's own",
            "1 hidden",
            "1 beside the",
        ):
            assert part in line
        assert "1 linked to nothing" in line

    def test_a_class_without_images_is_told(self, tmp_path: Path, caplog) -> None:
        open_dataset(save_folder(tmp_path, {"tench": 1, "goldfish": 0}), CLASSES)
        (line,) = caplog.messages
        assert line == f"{tmp_path}: no images in the folders of the classes 'goldfish'."

    def test_linked_folders_count_once_in_a_class(self, tmp_path: Path, caplog) -> None:
        save_folder(tmp_path, {"more": 2, "data/tench": 1})
        data = tmp_path / "data"
        (data / "tench" / "linked").symlink_to(tmp_path / "more")
        (data / "tench" / "loop").symlink_to(data)
        (data / "0").symlink_to(data / "tench")  # the same class by its index
        (data / "goldfish").symlink_to(tmp_path / "more")
        examples = open_dataset(data, CLASSES).examples
        assert sorted(Path(e.id).name for e in examples if e.label == 0) == [
            "0.png",
            "0.png",
            "1.png",
        ]
        assert [e.id for e in examples if e.label == 1] == ["goldfish/0.png", "goldfish/1.png"]
        assert "3 linked to files that are there already" in caplog.text
        assert "2 files stand in several classes by links" in caplog.text

    @pytest.mark.parametrize(
        "counts, message",
        [
            ({}, "a sub-folder for each class, got none"),
            ({"tench": 0, "goldfish": 0}, "images in its sub-folders, got none"),
            ({"tench": 1, "pike": 1, "eel": 1}, "does not know the classes 'eel', 'pike'"),
            ({"5": 1}, "does not know the classes '5'.*indices 0 to 4"),
            ({"-1": 1}, "does not know the classes '-1'"),
            ({"crane": 1}, "'crane' could be any of the model's classes 2, 3"),
            ({str(i): 1 for i in range(10, 20)}, "'14' and 5 more"),
        ],
    )
    def test_bad_folder(self, tmp_path: Path, counts: dict[str, int], message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_dataset(save_folder(tmp_path, counts), CLASSES)


class TestNpz:
    @pytest.mark.parametrize("keys", [("images", "labels"), ("x_test", "y_test")])
    @pytest.mark.parametrize("shape", [(8, 8), (5, 7, 3), (8, 8, 1), (9, 9, 4)])
    @pytest.mark.parametrize("label_type", [np.uint8, np.int64])
    def test_round_trip(
        self, tmp_path: Path, keys: tuple[str, str], shape: tuple[int, ...], label_type: type
    ) -> None:
        images, labels = pixels(6, *shape), np.array([0, 4, 1, 1, 2, 3], label_type)
        path = save_npz(tmp_path / "a.npz", **dict(zip(keys, (images, labels), strict=True)))
        dataset = open_dataset(str(path), CLASSES)
        assert [e.label for e in dataset.examples] == labels.tolist()
        assert dataset.names is None and dataset.name == "a.npz"
        np.testing.assert_array_equal(np.stack([e.load() for e in dataset.examples]), images)
        assert all(len(as_images(e.load(), 8, 3)) == 1 for e in dataset.examples)

    def test_images_and_labels_go_first(self, tmp_path: Path) -> None:
        arrays = {"x_test": pixels(2), "y_test": np.zeros(2, int)}
        arrays |= {"images": pixels(3), "labels": np.zeros(3, int)}
        assert len(open_dataset(save_npz(tmp_path / "a.npz", **arrays), CLASSES).examples) == 3

    def test_a_bad_picture_is_its_own_error(self, tmp_path: Path) -> None:
        images = RNG.random((3, 8, 8))
        images[1, 0, 0] = np.nan
        path = save_npz(tmp_path / "a.npz", images=images, labels=np.zeros(3, int))
        examples = open_dataset(path, CLASSES).examples
        with pytest.raises(ImageError, match="NaN"):
            as_images(examples[1].load(), 8, 1)
        assert len(as_images(examples[2].load(), 8, 1)) == 1

    @pytest.mark.parametrize(
        "arrays, message",
        [
            ({}, "images and labels, or x_test and y_test, or x, y, drawer and classes, got none"),
            ({"images": pixels(2)}, "images and labels.*got 'images'"),
            ({"images": pixels(2), "y_test": np.zeros(2, int)}, "got 'images', 'y_test'"),
            ({"images": pixels(2), "labels": np.zeros(3, int)}, "2 images and 3 labels"),
            ({"images": pixels(2), "labels": np.zeros(2)}, "integer labels.*float64"),
            ({"images": pixels(2), "labels": np.zeros((2, 5), int)}, r"shape \(2, 5\)"),
            ({"images": pixels(2), "labels": np.array([True, False])}, "integer labels.*bool"),
            ({"images": pixels(2), "labels": np.array([0, 5])}, "labels 0 to 4.*got 0 to 5"),
            ({"images": pixels(2), "labels": np.array([-1, 0])}, "labels 0 to 4.*got -1 to 0"),
            ({"images": pixels(0), "labels": np.zeros(0, int)}, "at least one image"),
            ({"images": pixels(2, 8), "labels": np.zeros(2, int)}, r"got shape \(2, 8\)"),
            ({"images": pixels(2, 3, 8, 8), "labels": np.zeros(2, int)}, r"shape \(2, 3, 8, 8\)"),
            ({"images": np.zeros((2, 8, 8), int), "labels": np.zeros(2, int)}, "got int64"),
            ({"images": np.array([{}, {}]), "labels": np.zeros(2, int)}, "pickled objects"),
        ],
    )
    def test_bad_arrays(self, tmp_path: Path, arrays: dict[str, object], message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_dataset(save_npz(tmp_path / "a.npz", **arrays), CLASSES)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_truncated(self, tmp_path: Path, share: float) -> None:
        path = save_npz(tmp_path / "a.npz", images=pixels(9), labels=np.zeros(9, int))
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match="truncated or damaged|pickled objects"):
            open_dataset(path, CLASSES)

    def test_damaged_member(self, tmp_path: Path) -> None:
        path = save_npz(tmp_path / "a.npz", images=pixels(9), labels=np.zeros(9, int))
        content = bytearray(path.read_bytes())
        content[100:200] = bytes(100)
        path.write_bytes(content)
        with pytest.raises(DataError, match="truncated or damaged"):
            open_dataset(path, CLASSES)

    def test_member_that_is_no_array(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images", b"text")
            archive.writestr("labels", b"text")
        with pytest.raises(DataError, match=r"expected images \[n, h, w\].*got shape \(\)"):
            open_dataset(tmp_path / "a.npz", CLASSES)

    def test_pickle(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([{}], dtype=object))
        (tmp_path / "a.npy").rename(tmp_path / "a.npz")
        with pytest.raises(DataError, match="pickle"):
            open_dataset(tmp_path / "a.npz", CLASSES)

    def test_single_array(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", pixels(2))
        (tmp_path / "a.npy").rename(tmp_path / "a.npz")
        with pytest.raises(DataError, match="got a single array"):
            open_dataset(tmp_path / "a.npz", CLASSES)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is there"):
        open_dataset(tmp_path / "missing", CLASSES)


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("1,2")
    with pytest.raises(DataError, match="an .npz file"):
        open_dataset(tmp_path / "data.txt", CLASSES)


class TestIdentity:
    def open(self, path: Path, images: np.ndarray, labels: np.ndarray) -> DataSet:
        path.parent.mkdir(exist_ok=True)
        return open_dataset(save_npz(path, images=images, labels=labels), CLASSES)

    def test_same_data_elsewhere(self, tmp_path: Path) -> None:
        images, labels = pixels(4), np.array([0, 1, 2, 3])
        first = self.open(tmp_path / "one" / "a.npz", images, labels).identity()
        assert first == self.open(tmp_path / "two" / "a.npz", images, labels).identity()
        assert first["source"] == "a.npz" and first["count"] == 4
        assert json.loads(json.dumps(first)) == first

    def test_other_pixels_or_labels(self, tmp_path: Path) -> None:
        images, labels = pixels(4), np.array([0, 1, 2, 3])
        first = self.open(tmp_path / "a.npz", images, labels).identity()
        other = images.copy()
        other[0, 0, 0] ^= 1
        assert self.open(tmp_path / "a.npz", other, labels).identity() != first
        assert self.open(tmp_path / "a.npz", images, labels[::-1]).identity() != first

    def test_folder(self, tmp_path: Path) -> None:
        save_folder(tmp_path, {"tench": 2})
        first = open_dataset(tmp_path, CLASSES).identity()
        assert open_dataset(f"{tmp_path}/", CLASSES).identity() == first
        (tmp_path / "tench" / "0.png").write_bytes(b"another image")
        assert open_dataset(tmp_path, CLASSES).identity() != first

    def test_other_subset(self) -> None:
        dataset = open_dataset("digits", NAMES)
        subsets = [dataset, select(dataset, 10, 0), select(dataset, 10, 1), select(dataset, 11, 0)]
        assert len({d.identity()["fingerprint"] for d in subsets}) == 4


class TestSelect:
    def test_reproducible_ordered_and_nested(self) -> None:
        dataset = open_dataset("digits", NAMES)
        small, large = (select(dataset, n, seed=3) for n in (10, 50))
        ids = [e.id for e in large.examples]
        assert ids == [e.id for e in select(dataset, 50, seed=3).examples] == sorted(ids)
        assert len(set(ids)) == 50
        assert {e.id for e in small.examples} < set(ids)
        assert ids != [e.id for e in select(dataset, 50, seed=4).examples]

    @pytest.mark.parametrize("limit", [None, 397, 10_000])
    def test_all(self, limit: int | None) -> None:
        dataset = open_dataset("digits", NAMES)
        assert select(dataset, limit, 0).examples == dataset.examples

    @pytest.mark.parametrize("limit, seed, got", [(0, 0, "got 0"), (-5, 0, "-5"), (3, -1, "-1")])
    def test_bad_arguments(self, limit: int, seed: int, got: str) -> None:
        with pytest.raises(DataError, match=got):
            select(open_dataset("digits", NAMES), limit, seed)
