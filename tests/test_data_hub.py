"""Data sets of Hugging Face's library: local ones, read as those of the hub are."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import noise_picture
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from dive_fast.data import DataSet, folder_classes, load_all, open_dataset, select
from dive_fast.data.hub_loading import parse_hub_set
from dive_fast.data.streams import StreamedExamples
from dive_fast.errors import DataError, ImageError

hf = pytest.importorskip("datasets")

CLASSES = ("dog, hound", "Cat", "fish")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def pictures(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 3 + i), (i, 0, 0)) for i in range(n)]


def made(n: int = 6, **columns: object) -> hf.Dataset:
    """n pictures, labels that alternate, a column of texts and one of numbers."""
    features = hf.Features(
        {
            "img": hf.Image(),
            "label": hf.ClassLabel(names=["cat", "dog"]),
            "site": hf.Value("string"),
            "n": hf.Value("int64"),
            "box": hf.List(hf.Value("int64")),
            "kind": hf.ClassLabel(names=["old", "new"]),
        }
    )
    cells = {
        "img": pictures(n),
        "label": [i % 2 for i in range(n)],
        "site": [None if i == 1 else f"s{i % 3}" for i in range(n)],
        "n": list(range(n)),
        "box": [[i] for i in range(n)],
        "kind": [1] * n,
    }
    return hf.Dataset.from_dict(cells | columns, features=features)


def parquet(folder: Path, data: hf.Dataset, split: str = "test") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def plain(folder: Path, labels: list, feature: object, name: str = "label") -> str:
    """Pictures with labels of another kind."""
    features = hf.Features({"image": hf.Image(), name: feature})
    cells = {"image": pictures(len(labels)), name: labels}
    return f"hf:{parquet(folder, hf.Dataset.from_dict(cells, features=features))}@test"


class TestRandomAccess:
    def test_ids_labels_facts_and_pixels(self, tmp_path: Path) -> None:
        dataset = open_dataset(f"hf:{parquet(tmp_path / 'animals', made())}@test", CLASSES)
        assert list(dataset.ids) == [f"{i:08d}" for i in range(6)]
        assert dataset.labels.tolist() == [1, 0] * 3
        assert [e.load().size for e in dataset.examples] == [(4, 3 + i) for i in range(6)]
        assert [e.load().getpixel((0, 0))[0] for e in dataset.examples] == list(range(6))
        assert dataset.examples[0].facts == {"site": "s0", "n": 0, "kind": "new"}
        assert dataset.examples[1].facts == {"n": 1, "kind": "new"}
        assert (dataset.name, dataset.names) == ("animals@test", ("cat", "dog"))

    def test_the_same_data_in_every_form(self, tmp_path: Path) -> None:
        data = made()
        data.save_to_disk(tmp_path / "disk")
        hf.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(tmp_path / "dict")
        file = parquet(tmp_path / "parquet", data) / "test-00000-of-00001.parquet"
        opened = [
            open_dataset(f"hf:{tmp_path}/{place}", CLASSES)
            for place in ("disk", "dict@test", "parquet@test", f"parquet/{file.name}@any")
        ]
        assert {tuple(d.labels.tolist()) for d in opened} == {(1, 0) * 3}
        assert {d.examples[4].load().size for d in opened} == {(4, 7)}

    def test_folder_of_images(self, tmp_path: Path) -> None:
        for name in ("cat", "dog"):
            (tmp_path / "images" / "test" / name).mkdir(parents=True)
            for i, image in enumerate(pictures(2)):
                image.save(tmp_path / "images" / "test" / name / f"{i}.png")
        dataset = open_dataset(f"hf:{tmp_path}/images@test", CLASSES)
        assert dataset.labels.tolist() == [1, 1, 0, 0]
        assert [e.load().size for e in dataset.examples] == [(4, 3), (4, 4)] * 2

    def test_a_slice_of_a_split(self, tmp_path: Path) -> None:
        dataset = open_dataset(f"hf:{parquet(tmp_path / 'a', made())}@test[1:3]", CLASSES)
        assert dataset.labels.tolist() == [0, 1]
        assert [e.load().size for e in dataset.examples] == [(4, 4), (4, 5)]

    def test_a_bad_picture_is_its_own_error(self, tmp_path: Path) -> None:
        good = io.BytesIO()
        noise_picture((40, 40), 9).save(good, "PNG")
        cells = [
            {"bytes": b"no image", "path": None},
            {"bytes": good.getvalue()[:80], "path": None},
            None,
            {"bytes": None, "path": str(tmp_path / "gone.png")},
            {"bytes": good.getvalue(), "path": None},
        ]
        place = parquet(tmp_path / "a", made(5).remove_columns("img").add_column("img", cells))
        *bad, fine = open_dataset(f"hf:{place}@test?image=img", CLASSES).examples
        for example, got in zip(
            bad, ("no known", "truncated", "got none", "gone.png"), strict=True
        ):
            with pytest.raises(ImageError, match=got):
                example.load()
        assert fine.load().size == (40, 40)

    def test_subset_pickles(self, tmp_path: Path) -> None:
        place = parquet(tmp_path / "a", made(40))
        sent = pickle.dumps(select(open_dataset(f"hf:{place}@test", CLASSES), 5, 0))
        received = pickle.loads(sent)
        assert [e.facts["n"] for e in received.examples] == [int(i) for i in received.ids]
        assert [e.load().height - 3 for e in received.examples] == [int(i) for i in received.ids]

    def test_identity_elsewhere(self, tmp_path: Path) -> None:
        one, two = (open_dataset(f"hf:{parquet(tmp_path / place / 'a', made())}@test", CLASSES)
                    for place in ("one", "two"))  # fmt: skip
        assert one.identity() == two.identity()
        other = parquet(tmp_path / "three" / "a", made(label=[1, 0] * 3))
        assert open_dataset(f"hf:{other}@test", CLASSES).content != one.content
        other = parquet(tmp_path / "four" / "a", made(img=pictures(12)[::2]))
        assert open_dataset(f"hf:{other}@test", CLASSES).content != one.content

    def test_identity_of_splits_with_the_same_labels(self, tmp_path: Path) -> None:
        place = parquet(parquet(tmp_path / "a", made()), made(), "train")
        for options in ("", "?streaming=true"):
            train, test = (
                open_dataset(f"hf:{place}@{s}{options}", CLASSES) for s in ("train", "test")
            )
            assert train.content != test.content

    def test_where_opens_it_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        parquet(tmp_path / "a", made())
        monkeypatch.chdir(tmp_path)
        dataset = open_dataset("hf:a@test?label=kind&classes=index", CLASSES)
        monkeypatch.chdir("/")
        assert open_dataset(dataset.where, CLASSES).labels.tolist() == [1] * 6


class TestColumns:
    def test_several_of_a_type(self, tmp_path: Path) -> None:
        names = hf.ClassLabel(names=["cat", "dog"])
        features = hf.Features(
            {"mask": hf.Image(), "image": hf.Image(), "coarse_label": names, "fine_label": names}
        )
        cells = {"mask": pictures(2)[::-1], "image": pictures(2), "coarse_label": [0, 0],
                 "fine_label": [1, 0]}  # fmt: skip
        place = parquet(tmp_path / "a", hf.Dataset.from_dict(cells, features=features))
        dataset = open_dataset(f"hf:{place}@test", CLASSES)
        assert dataset.labels.tolist() == [0, 1]
        assert dataset.examples[0].load().size == (4, 3)
        assert dataset.examples[0].facts == {"coarse_label": "cat"}
        named = open_dataset(f"hf:{place}@test?image=mask&label=coarse_label", CLASSES)
        assert named.labels.tolist() == [1, 1] and named.examples[0].load().size == (4, 4)

    def test_names_as_texts(self, tmp_path: Path) -> None:
        spec = plain(tmp_path / "a", ["fish", "CAT", "fish"], hf.Value("string"), "category")
        dataset = open_dataset(spec, CLASSES)
        assert dataset.labels.tolist() == [2, 1, 2] and dataset.names == ("CAT", "fish")
        assert folder_classes(spec) == ["CAT", "fish"]

    def test_numbers_are_rows(self, tmp_path: Path) -> None:
        spec = plain(tmp_path / "a", [2, 0], hf.Value("int64"))
        assert open_dataset(spec, CLASSES).labels.tolist() == [2, 0]
        assert folder_classes(spec) is None

    def test_numbers_of_a_list_are_rows_where_asked(self, tmp_path: Path) -> None:
        place = parquet(tmp_path / "a", made())
        dataset = open_dataset(f"hf:{place}@test?classes=index", ("kitten", "puppy"))
        assert dataset.labels.tolist() == [0, 1] * 3

    def test_classes_in_their_order(self, tmp_path: Path) -> None:
        place = parquet(tmp_path / "a", made())
        assert folder_classes(f"hf:{place}@test?label=kind") == ["old", "new"]
        assert folder_classes(f"hf:{place}@test?streaming=true") == ["cat", "dog"]


class TestStream:
    @pytest.fixture
    def spec(self, tmp_path: Path) -> str:
        return f"hf:{parquet(tmp_path / 'a', made())}@test?streaming=true"

    def test_agrees_with_random_access(self, spec: str) -> None:
        stream = select(open_dataset(spec, CLASSES), 6, 0)
        stored = open_dataset(spec.removesuffix("?streaming=true"), CLASSES)
        assert stream.labels is None and list(stream.ids) == list(stored.ids)
        for one, two in zip(stream.examples, stored.examples, strict=True):
            assert (one.id, one.label, one.facts) == (two.id, two.label, two.facts)
            assert one.load().tobytes() == two.load().tobytes()
        images, labels = load_all(stream)
        assert len(images) == 6 and labels.tolist() == stored.labels.tolist()

    def test_first_and_some(self, spec: str) -> None:
        dataset = select(open_dataset(spec, CLASSES), 5, seed=7)
        assert [e.id for e in dataset.examples] == [f"{i:08d}" for i in range(5)]
        taken = pickle.loads(pickle.dumps(dataset.take([1, 4])))
        assert list(taken.ids) == ["00000001", "00000004"] == [e.id for e in taken.examples]
        assert [e.load().height for e in taken.examples] == [4, 7]
        assert list(dataset.take([]).examples) == []

    def test_by_index(self, spec: str) -> None:
        """Read on from one index to the next; anew for one further back."""
        stream = open_dataset(spec, CLASSES).examples._stream
        starts = []

        class Counting:
            where = "counted"

            def examples(self, start: int):
                starts.append(start)
                return stream.examples(start)

        examples = StreamedExamples(Counting(), [1, 2, 4, 5])
        assert [examples[i].id[-1] for i in (0, 1, 3)] == ["1", "2", "5"] and starts == [1]
        assert [examples[i].load().height for i in (2, -1, 0)] == [7, 8, 4] and starts == [1, 4, 1]
        with pytest.raises(IndexError):
            examples[4]
        with pytest.raises(DataError, match="expected 10 images, but the stream ended before"):
            StreamedExamples(stream, [9])[0]

    def test_not_in_workers_that_would_get_a_part(self, spec: str) -> None:
        dataset = select(open_dataset(spec, CLASSES), 2, 0)
        loader = DataLoader(WholeStream(dataset), batch_size=None, num_workers=1)
        with pytest.raises(DataError, match="not in a worker of a DataLoader"):
            list(loader)

    def test_only_what_is_asked_is_decoded(self, tmp_path: Path) -> None:
        cells = [{"bytes": b"no image", "path": None}] * 4
        place = parquet(tmp_path / "a", made(4).remove_columns("img").add_column("img", cells))
        spec = f"hf:{place}@test?streaming=true&image=img"
        examples = list(select(open_dataset(spec, CLASSES), 4, 0).examples)
        with pytest.raises(ImageError, match="^00000002: "):
            examples[2].load()

    def test_names_as_texts(self, tmp_path: Path) -> None:
        spec = plain(tmp_path / "a", ["fish", "cow"], hf.Value("string")) + "?streaming=true"
        dataset = select(open_dataset(spec, CLASSES), 2, 0)
        examples = iter(dataset.examples)
        assert next(examples).label == 2 and dataset.names is None
        with pytest.raises(DataError, match="row 1: the model does not know the classes 'cow'"):
            next(examples)

    def test_elsewhere(self, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        sent = pickle.dumps(select(open_dataset("hf:a@test?streaming=true", CLASSES), 2, 0))
        monkeypatch.chdir("/")
        assert [e.load().height for e in pickle.loads(sent).examples] == [3, 4]

    def test_identity_counts(self, spec: str) -> None:
        dataset = open_dataset(spec, CLASSES)
        three, six = (select(dataset, n, 0).identity() for n in (3, 6))
        assert three["count"] == 3 and three["fingerprint"] != six["fingerprint"]

    def test_refused(self, spec: str, tmp_path: Path) -> None:
        dataset = select(open_dataset(spec, CLASSES), 9, 0)
        with pytest.raises(DataError, match="expected 9 images, but the stream ended before"):
            list(select(StreamWithoutCount.of(dataset), 9, 0).examples)
        with pytest.raises(DataError, match="--limit N takes the first N"):
            StreamWithoutCount.of(dataset).identity()
        with pytest.raises(DataError, match="positions that ascend"):
            dataset.take([2, 1])
        with pytest.raises(DataError, match="model does not know the classes 'cat'"):
            open_dataset(spec, ("dog", "cow"))
        made().save_to_disk(tmp_path / "disk")
        with pytest.raises(DataError, match="save_to_disk wrote is not streamed"):
            open_dataset(f"hf:{tmp_path}/disk?streaming=true", CLASSES)


class WholeStream(IterableDataset):
    """The ids of a stream, for torch."""

    def __init__(self, dataset: DataSet) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[str]:
        return (example.id for example in self.dataset.examples)


class StreamWithoutCount:
    """A stream of which nobody says how long it is."""

    @staticmethod
    def of(dataset):
        return replace(dataset, examples=StreamedExamples(dataset.examples._stream, None))


class TestRefused:
    @pytest.mark.parametrize(
        "spec, got",
        [
            ("a", r"expected hf:NAME\[:CONFIG\]@SPLIT, got the splits test"),
            ("a@train", "cannot be loaded: .*train"),
            ("a:other@test", "cannot be loaded: .*other"),
            ("a@test?image=n", "a@test: expected images in the column 'n': "),
            ("a@test?image=x", "expected a column 'x', got the columns 'img', 'label', 'site'"),
            ("a@test?label=box", r"row 0: expected the name or index of a class, got \[0\]"),
            ("a@test?label=site", "row 1: expected the name or index of a class, got none"),
            ("a@test?streaming=yes", "expected streaming=true, got 'yes'"),
            ("a@test?lable=x", "expected the options image, label, classes, revision, streaming"),
            ("a@test?label=site&classes=index", "classes=index needs numbers in 'site'"),
            ("disk@test", "there is one part without a name: leave the split out"),
            ("dict@val", "got 'val'; there is train, test"),
            ("dict", "got the splits train, test"),
            ("gone@test", "expected a data set, but .*gone is not there"),
        ],
    )
    def test_specs(self, tmp_path: Path, spec: str, got: str) -> None:
        data = made()
        parquet(tmp_path / "a", data)
        data.save_to_disk(tmp_path / "disk")
        hf.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "dict")
        with pytest.raises(DataError, match=got) as error:
            open_dataset(f"hf:{tmp_path}/{spec}", CLASSES)
        assert "\n" not in str(error.value) and len(str(error.value)) < 900

    def test_labels(self, tmp_path: Path) -> None:
        place = parquet(tmp_path / "a", made(label=[-1] * 6))
        with pytest.raises(DataError, match="row 0: .* got -1; some splits have no labels"):
            open_dataset(f"hf:{place}@test", CLASSES)
        with pytest.raises(DataError, match="the model does not know the classes 5"):
            open_dataset(plain(tmp_path / "b", [0, 5], hf.Value("int64")), CLASSES)
        with pytest.raises(DataError, match="does not know the classes 'dog': .* 'cat', 'fish'"):
            open_dataset(f"hf:{parquet(tmp_path / 'c', made())}@test", ("cat", "fish"))

    def test_no_columns_of_the_types(self, tmp_path: Path) -> None:
        data = hf.Dataset.from_dict({"x": [1], "y": [0]})
        with pytest.raises(
            DataError, match="expected a column called image, .* the columns 'x', 'y'"
        ):
            open_dataset(f"hf:{parquet(tmp_path / 'a', data)}@test", CLASSES)

    def test_no_name(self) -> None:
        with pytest.raises(DataError, match="got no name"):
            open_dataset("hf:@test", CLASSES)

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"is not installed: pip install 'dive_fast\[hf\]'"):
            open_dataset("hf:mnist@test", CLASSES)


def test_a_name_of_the_hub_without_a_network(tmp_path: Path) -> None:
    """One sentence, and no lines about retries. Offline by setting, so that nobody waits."""
    code = "from dive_fast.data import open_dataset\nopen_dataset('hf:nobody/nothing:x@test', 'ab')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "DataError: hf:nobody/nothing:x@test: cannot be loaded: " in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("dive_fast.errors.DataError")


def test_names_of_the_hub_are_not_looked_up_to_be_read() -> None:
    found = parse_hub_set("hf:me/birds:small@validation[:10%]?revision=abc&streaming=true")
    assert (found.place, found.config, found.split) == ("me/birds", "small", "validation[:10%]")
    assert (found.revision, found.streaming, found.by_index) == ("abc", True, False)
    assert found.name == "me/birds:small@validation[:10%]"
