"""Boxes to tokens and back, on random layouts and formats."""

from __future__ import annotations

import json
import random

import pytest
import torch

from dive_fast.core.layouts import Layout, LayoutFormat
from dive_fast.errors import DiveFastError

PUBLISHED = LayoutFormat.latent_diffusion([f"thing {i}" for i in range(600)])


def random_format(rng: random.Random) -> LayoutFormat:
    names = [f"class {i}" for i in range(rng.randint(1, 12))]
    if rng.random() < 0.3:
        return LayoutFormat.latent_diffusion(names, rng.randint(1, 9), rng.choice([63, 65, 300]))
    return LayoutFormat.compact(
        names, rng.randint(1, 9), rng.choice([2, 3, 17, 65, 90]), rng.random() < 0.5
    )


def random_layout(rng: random.Random, form: LayoutFormat) -> Layout:
    """Any number of objects, of any size above a step, edges of the image included."""
    boxes, step = [], 1 / (form.grid - 1)
    for _ in range(rng.randint(0, form.max_objects)):
        width, height = (rng.choice([step, 1.0, rng.uniform(step, 1)]) for _ in range(2))
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        boxes.append([left, top, min(left + width, 1.0), min(top + height, 1.0)])
    boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4).float().clamp(0, 1)
    return Layout(boxes, torch.randint(len(form.names), (len(boxes),)))


@pytest.mark.parametrize("seed", range(100))
def test_round_trip_of_layouts(seed):
    rng, _ = random.Random(seed), torch.manual_seed(seed)
    form = random_format(rng)
    layout = random_layout(rng, form)
    # A box of exactly one step may lose it to float32; then it is none that can be encoded.
    keep = form.encodable(layout.boxes)
    layout = Layout(layout.boxes[keep], layout.class_ids[keep])
    tokens = form.encode(layout)
    assert tokens.shape == (form.n_slots,) and tokens.dtype == torch.int64
    back = form.decode(tokens)
    assert torch.equal(back.class_ids, layout.class_ids)
    assert (back.boxes - layout.boxes).abs().le(0.5 / (form.grid - 1) + 1e-6).all()
    assert torch.equal(form.encode(back), tokens)


@pytest.mark.parametrize("seed", range(30))
def test_every_valid_sequence_of_tokens_is_a_layout(seed):
    """What the projection gives can be decoded, and encodes to itself."""
    rng, _ = random.Random(seed), torch.manual_seed(seed)
    form = random_format(rng)
    table = torch.randn(form.vocabulary_size, 4)
    index = form.projection(table).index(torch.randn(3, form.n_slots, 4))
    for tokens in index:
        objects = tokens[: 3 * form.max_objects].view(-1, 3)
        present = objects[objects[:, 0] != form.none]
        again = form.encode(form.decode(tokens))
        assert torch.equal(again[: present.numel()], present.flatten())
        assert (again[present.numel() : 3 * form.max_objects] == form.none).all()
        assert torch.equal(again[3 * form.max_objects :], tokens[3 * form.max_objects :])


@pytest.mark.parametrize("form", [LayoutFormat.compact(("a", "b"), 3, 5, crop=True), PUBLISHED])
def test_many_layouts_are_written_and_read(form):
    """Absent objects have class -1; a triple that is none in part is none."""
    class_ids = torch.tensor([[[1, -1], [-1, -1]], [[0, 1], [-1, 0]]])
    sides = torch.tensor([[0, 1, 4, 3], [2, 2, 3, 4]]).expand(2, 2, 2, 4)
    tokens = form.write(class_ids, sides)
    assert tokens.shape == (2, 2, form.n_slots)
    found, read = form.read(tokens)
    assert found.shape == (2, 2, form.max_objects) and read.shape == (2, 2, form.max_objects, 4)
    assert torch.equal(found[..., :2], class_ids) and (found[..., 2:] == -1).all()
    assert torch.equal(read[..., :2, :][class_ids >= 0], sides[class_ids >= 0])
    tokens[1, 0, 2] = form.none
    assert form.read(tokens)[0][1, 0, :2].tolist() == [-1, 1]


def test_published_tokens():
    """Classes and corners share the tokens; the crop is the whole image."""
    assert (PUBLISHED.grid, PUBLISHED.none, PUBLISHED.n_slots) == (90, 8191, 92)
    assert PUBLISHED.class_range == (0, 600) and PUBLISHED.coordinate_range == (0, 8100)
    layout = Layout(
        torch.tensor([[0.0, 0.5, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]]), torch.tensor([7, 0])
    )
    tokens = PUBLISHED.encode(layout)
    # round(0.5 * 89) = round(44.5) = 44, half to even.
    expected = [7, 44 * 90, 8099, 0, 18 * 90 + 9, 36 * 90 + 27]
    assert tokens[:6].tolist() == expected
    assert tokens[6:].tolist() == [8191] * 84 + [0, 8099]


def test_compact_tokens_are_disjoint():
    form = LayoutFormat.compact(("a", "b"), 2, 3)
    assert (form.vocabulary_size, form.none, form.n_slots) == (12, 11, 6)
    assert form.class_range == (0, 2) and form.coordinate_range == (2, 11)
    names = form.token_names()
    assert names[:3] == ("a", "b", "(0, 0)") and names[10:] == ("(2, 2)", "none")
    assert PUBLISHED.token_names()[91] == "thing 91 or (1, 1)"
    assert PUBLISHED.token_names()[8150] == "unused 8150"


def test_no_object_at_all():
    form = LayoutFormat.compact(("a",), 3, 5, crop=True)
    empty = Layout(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    tokens = form.encode(empty)
    assert tokens.tolist() == [26] * 9 + [1, 25]
    assert len(form.decode(tokens)) == 0


@pytest.mark.parametrize("crop", [False, True])
def test_projection_keeps_the_whole_picture_and_the_metric(crop):
    form = LayoutFormat.compact(("a", "b"), 2, 3, crop)
    table = torch.randn(form.vocabulary_size, 5, generator=torch.Generator().manual_seed(0))
    projection = form.projection(table, "cosine", (2, 1))
    assert (projection.metric, projection.min_size) == ("cosine", (2, 1))
    index = projection.index(torch.randn(50, form.n_slots, 5))
    assert (index[:, 6:] == torch.tensor([2, 10][: 2 * crop])).all()


def test_dictionary_round_trip():
    for form in (PUBLISHED, LayoutFormat.compact(("a",), 1, 2)):
        assert LayoutFormat.from_dict(json.loads(json.dumps(form.to_dict()))) == form


BOX = [0.1, 0.1, 0.6, 0.6]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([-0.1, 0.0, 0.5, 0.5], "boxes must lie in the unit interval, but got .*-0.1"),
        ([0.0, 0.0, 0.5, 1.01], "unit interval"),
        ([0.0, 0.0, float("nan"), 0.5], "unit interval, but got .*nan"),
        ([0.5, 0.0, 0.2, 0.5], "of some size, but got"),
        ([0.5, 0.0, 0.5, 0.5], "of some size"),
    ],
)
def test_impossible_boxes(box, message):
    with pytest.raises(DiveFastError, match=message):
        Layout(torch.tensor([BOX, box]), torch.tensor([0, 0]))


def test_impossible_layouts():
    with pytest.raises(DiveFastError, match=r"boxes must be float32 of shape \[n, 4\]"):
        Layout(torch.zeros(2, 3), torch.tensor([0, 0]))
    with pytest.raises(DiveFastError, match=r"class_ids must be int64 of shape \[1\]"):
        Layout(torch.tensor([BOX]), torch.tensor([0, 0]))
    with pytest.raises(DiveFastError, match="class_ids must be at least 0, but got -1"):
        Layout(torch.tensor([BOX]), torch.tensor([-1]))


@pytest.mark.parametrize(
    ("boxes", "ids", "message"),
    [
        ([BOX] * 3, [0] * 3, "a layout may have 2 objects, but got 3"),
        ([BOX], [2], "class_ids must be below 2, but got 2"),
        ([BOX, [0.0, 0.0, 0.05, 1.0]], [0, 1], r"a step of the 5 x 5 grid, but got \[0.0, 0.0"),
    ],
)
def test_layouts_that_cannot_be_encoded(boxes, ids, message):
    form = LayoutFormat.compact(("a", "b"), 2, 5)
    with pytest.raises(DiveFastError, match=message):
        form.encode(Layout(torch.tensor(boxes), torch.tensor(ids)))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 1, 10], r"tokens must be int64 of shape \[5\]"),
        ([0, 10, 1, 1, 9], "none in all three slots or in none, but got .*10"),
        ([1, 1, 9, 1, 9], r"class tokens must be in \[0, 1\), but got 1"),
        ([0, 0, 9, 1, 9], r"coordinate tokens must be in \[1, 10\), but got 0"),
        ([0, 1, 9, 1, 10], r"coordinate tokens must be in \[1, 10\), but got 10"),
        ([0, 9, 1, 1, 9], r"below and to the right .*\[2, 2, 0, 0\]"),
        ([0, 1, 3, 1, 9], r"below and to the right .*\[0, 0, 2, 0\]"),
    ],
)
def test_tokens_that_are_no_layout(tokens, message):
    form = LayoutFormat.compact(("a",), 1, 3, crop=True)
    with pytest.raises(DiveFastError, match=message):
        form.decode(torch.tensor(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": []}, "names must hold at least one class"),
        ({"max_objects": 0}, "max_objects must be at least 1, but got 0"),
        ({"grid": 1}, "grid must be at least 2"),
        ({"grid": 4}, r"the coordinate tokens must be within \[0, 11\), but got \[1, 17\)"),
        ({"class_start": 11}, "the class tokens must be within"),
        ({"none": 0}, r"none must be outside the class tokens \[0, 1\), but got 0"),
        ({"none": 5}, "none must be outside the coordinate tokens"),
        ({"none": 11}, r"none must be in \[0, 11\)"),
        ({"names": "ab"}, "names must be given as a list"),
        ({"names": [1]}, "names must be strings"),
        ({"names": ["cat", " "]}, "names must be strings that are not empty, but got ' '"),
        ({"crop": 1}, "crop must be given as bool"),
        ({"grid": True}, "grid must be given as int"),
        ({"grids": 3}, "the entries must be among .*, but got grids"),
    ],
)
def test_formats_that_do_not_fit(changes, message):
    good = LayoutFormat.compact(("a",), 1, 3).to_dict()
    with pytest.raises(DiveFastError, match=message):
        LayoutFormat.from_dict(good | changes)


def test_a_table_of_another_vocabulary():
    with pytest.raises(DiveFastError, match=r"table must have shape \[11, D\], but got \[10, 2\]"):
        LayoutFormat.compact(("a",), 1, 3).projection(torch.zeros(10, 2))


def test_a_square_vocabulary_has_no_room_for_none():
    with pytest.raises(
        DiveFastError, match=r"none must be outside the coordinate tokens \[0, 64\)"
    ):
        LayoutFormat.latent_diffusion(["a"], vocabulary_size=64)
