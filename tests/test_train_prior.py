"""``dive-fast train-prior``: from annotations to a prior that a model can use."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from tiny_layout import make_layout_model

from dive_fast.data.coco import CocoDataset, CocoImage, held_out_split, read_box_arrays
from dive_fast.errors import DataError
from dive_fast.models import load_model
from dive_fast.priors import layout_tokens, load_prior
from dive_fast.training import prior as train_prior_module
from dive_fast.training.scenes import SCENES_FORMAT


def dataset(*images: list, names: tuple[str, ...] = ("Three", "dog", "one")) -> CocoDataset:
    """Images of 100 x 100; objects are (class, left, top, right, bottom, crowd)."""
    made = []
    for number, objects in enumerate(images):
        rows = torch.tensor(objects, dtype=torch.float32).view(-1, 6)
        made.append(
            CocoImage(
                id=number,
                path=None,
                size=(100, 100),
                boxes=rows[:, 1:5],
                class_ids=rows[:, 0].long(),
                crowd=rows[:, 5].bool(),
            )
        )
    return CocoDataset(names, tuple(range(len(names))), tuple(made), "boxes.json")


BIG, BIGGER, SMALL = (0, 0, 50, 50), (0, 0, 100, 100), (0, 0, 100, 5)


class TestLayoutTokens:
    def test_what_fits(self, layout_dir: Path) -> None:
        """Classes go by name; objects keep their order; an image without boxes is one too."""
        form = load_model(layout_dir).layout_format
        tokens, said = layout_tokens(dataset([(2, *BIG, 0), (0, *BIGGER, 0)], []), form)
        assert said == ()
        first = form.decode(tokens[0])
        assert [form.names[c] for c in first.class_ids] == ["one", "three"]
        assert first.boxes.tolist() == [[0, 0, 0.5, 0.5], [0, 0, 1, 1]]
        assert len(form.decode(tokens[1])) == 0

    def test_what_does_not(self, layout_dir: Path) -> None:
        form = load_model(layout_dir).layout_format
        tokens, said = layout_tokens(
            dataset(
                [(1, *BIG, 0), (0, *BIG, 0)],  # a dog
                [(0, *SMALL, 0)],
                [(0, *BIG, 1), (2, *BIG, 0)],  # a crowd
                [(0, *BIG, 0), (0, 0, 0, 25, 25, 0), (2, *BIGGER, 0)],  # one too many
            ),
            form,
        )
        assert len(tokens) == 3
        assert form.decode(tokens[2]).boxes.tolist() == [[0, 0, 0.5, 0.5], [0, 0, 1, 1]]
        assert said == (
            "boxes.json: boxes left out because they mark crowds: 1.",
            "boxes.json: boxes left out because the model lacks their classes: 1.",
            "boxes.json: boxes left out because they are below a step of the 5 x 5 grid: 1.",
            "boxes.json: boxes left out beyond the 2 largest of an image: 1.",
            "boxes.json: images left out because no box of theirs is left: 1.",
        )

    def test_nothing_fits(self, layout_dir: Path) -> None:
        form = load_model(layout_dir).layout_format
        with pytest.raises(DataError, match="expected a layout that the model can write, got none"):
            layout_tokens(dataset([(0, *SMALL, 0)]), form)
        with pytest.raises(DataError, match="expected classes that the model knows"):
            layout_tokens(dataset([(0, *BIG, 0)], names=("cat",)), form)


def test_a_tenth_is_held_out() -> None:
    train, held_out = held_out_split(50, "boxes.json")
    assert (len(train), len(held_out)) == (45, 5)
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(50))
    assert torch.equal(held_out_split(50, "boxes.json")[1], held_out)
    assert [len(part) for part in held_out_split(50, "boxes.json", 2)] == [48, 2]
    with pytest.raises(DataError, match="expected at least 2 images to learn from, got 1"):
        held_out_split(1, "boxes.json")


def write_annotations(path: Path) -> Path:
    boxes = [[0, 0, 50, 50], [25, 50, 50, 50], [10, 10, 90, 2]]
    annotations = [
        {"id": 3 * i + j + 1, "image_id": i, "category_id": 1, "bbox": box}
        for i in range(6)
        for j, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": i, "file_name": "", "width": 100, "height": 100} for i in range(6)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "two"}],
    }
    path.write_text(json.dumps(content))
    return path


def test_the_command(layout_dir: Path, tmp_path: Path, capsys) -> None:
    boxes, out = write_annotations(tmp_path / "boxes.json"), tmp_path / "prior"
    arguments = ["train-prior", "--annotations", boxes, "--model", layout_dir, "--out", out]
    said = call(capsys, *arguments, "--steps", 3)
    assert said.code == 0
    assert "below a step of the 5 x 5 grid: 6." in said.err
    facts = json.loads((out / "dive_fast.json").read_text())
    loss = facts["expected"]["held_out_loss"]
    assert said.out == f"{out}: loss {loss:.4f} of 1 held-out layouts, learned from 5 layouts\n"
    loaded = load_model(layout_dir)
    prior = load_prior(out, loaded.layout_format, loaded.vocabulary.table)
    v = loaded.embed(torch.full((1, loaded.layout_format.n_slots), loaded.layout_format.none))
    v = v.unflatten(1, (loaded.layout_format.n_slots, -1))
    assert torch.isfinite(prior.losses(v, torch.tensor([500]), torch.zeros_like(v))).all()
    assert_refused(call(capsys, *arguments), "holds a prior already; choose another --out")


def test_scenes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(train_prior_module, "N_HELD_OUT_SCENES", 8)
    model, out = tmp_path / "model", tmp_path / "model" / "prior"
    make_layout_model(form=SCENES_FORMAT).save_pretrained(model)
    said = call(
        capsys, "train-prior", "--annotations", "scenes", "--model", model, "--out", out,
        "--steps", 2, "--bf16",
    )  # fmt: skip
    assert said.code == 0
    assert said.out.endswith("of 8 held-out layouts, learned from scenes made anew\n")
    assert json.loads((out / "dive_fast.json").read_text())["config"]["bf16"] is True
    loaded = load_model(model)
    load_prior(out, loaded.layout_format, loaded.vocabulary.table)


class TestBadInput:
    def refused(self, capsys, out: Path, annotations: object, model: object, message: str) -> None:
        said = call(
            capsys, "train-prior", "--annotations", annotations, "--model", model, "--out", out
        )
        assert_refused(said, message)

    def test_no_annotations(self, layout_dir: Path, tmp_path: Path, capsys) -> None:
        for name in ("none.json", "none.npz"):
            missing = tmp_path / name
            self.refused(capsys, tmp_path / "out", missing, layout_dir, "but nothing is there")
        assert not (tmp_path / "out").exists()

    def test_a_model_without_layouts(self, tmp_path: Path, capsys) -> None:
        boxes = write_annotations(tmp_path / "boxes.json")
        message = "expected a layout-to-image model, got digits, which has no layouts"
        self.refused(capsys, tmp_path / "out", boxes, "digits", message)

    def test_scenes_for_another_model(self, layout_dir: Path, tmp_path: Path, capsys) -> None:
        message = "expected a model of the scenes' layouts"
        self.refused(capsys, tmp_path / "out", "scenes", layout_dir, message)

    def test_out(self, layout_dir: Path, tmp_path: Path, capsys) -> None:
        boxes = write_annotations(tmp_path / "boxes.json")
        (tmp_path / "file").write_text("")
        self.refused(capsys, tmp_path / "file", boxes, layout_dir, "cannot be made a directory")
        self.refused(
            capsys, layout_dir, boxes, layout_dir, "holds a model; choose its folder prior"
        )


def arrays() -> dict[str, np.ndarray]:
    """Three images; the second is of the test set, the first one's last box has no height."""
    return {
        "image_id": np.array([7, 8, 9], dtype=np.int32),
        "width": np.array([100, 100, 50], dtype=np.int16),
        "height": np.array([80, 80, 50], dtype=np.int16),
        "offset": np.array([0, 2, 3, 4], dtype=np.int32),
        "box_xyxy": np.array(
            [[1, 2, 30, 40], [1, 2, 30, 2], [0, 0, 9, 9], [0, 0, 51, 50]], dtype=np.int16
        ),
        "label": np.array([1, 0, 0, 0], dtype=np.int8),
        "suspect_crowd": np.array([0, 0, 0, 1], dtype=np.int8),
        "coco_category_id": np.array([1, 3], dtype=np.int16),
        "names": np.array(["person", "car"]),
        "in_open_test": np.array([False, True, False]),
    }


class TestBoxArrays:
    def write(self, path: Path, **changed: object) -> Path:
        content = {**arrays(), **changed}
        buffer = io.BytesIO()
        np.savez(buffer, **{name: a for name, a in content.items() if a is not None})
        path.write_bytes(buffer.getvalue())
        return path

    def test_reads(self, tmp_path: Path) -> None:
        data = read_box_arrays(self.write(tmp_path / "boxes.npz"))
        assert data.names == ("person", "car") and data.category_ids == (1, 3)
        assert [image.id for image in data.images] == [7, 9]
        first, last = data.images
        assert first.boxes.tolist() == [[1, 2, 30, 40]] and first.class_ids.tolist() == [1]
        assert last.boxes.tolist() == [[0, 0, 50, 50]] and last.crowd.tolist() == [True]
        assert (first.size, last.size) == ((100, 80), (50, 50))
        assert data.problems == (
            "boxes.npz: images of the open test set left out: 1.",
            "boxes.npz: boxes without area left out: 1.",
        )

    def test_an_array_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="got none called offset"):
            read_box_arrays(self.write(tmp_path / "boxes.npz", offset=None))

    @pytest.mark.parametrize("offset", [[0, 2, 4], [0, 2, 3, 5], [0, 3, 2, 4]])
    def test_arrays_that_do_not_fit(self, offset: list[int], tmp_path: Path) -> None:
        with pytest.raises(DataError, match="expected the boxes of 3 images"):
            read_box_arrays(self.write(tmp_path / "boxes.npz", offset=np.array(offset)))

    def test_damaged(self, tmp_path: Path) -> None:
        (tmp_path / "boxes.npz").write_bytes(b"PK\x03\x04 no archive")
        with pytest.raises(DataError, match="unreadable, truncated or damaged"):
            read_box_arrays(tmp_path / "boxes.npz")
