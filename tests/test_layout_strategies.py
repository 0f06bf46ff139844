"""Searches for layouts on the analytic model, where the true layout has loss 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from layout_searches import SCENES, drive, make_board, run
from toy_layout import ToyLayoutModel

from dive_fast.errors import DiveFastError
from dive_fast.strategies.layout import (
    ANY,
    Board,
    Box,
    Guided,
    InvertLayout,
    Item,
    layout_strategy_names,
    register_layout_strategy,
    registry,
    resolve_layout_strategy,
)
from dive_fast.strategies.layout.board import LayoutProbes, measure, with_class
from dive_fast.strategies.layout.boxes import halves, neighbours, overlap, touching, union
from dive_fast.strategies.layout.settle import decide, drop_duplicates, settle
from dive_fast.strategies.layout.state import State


@pytest.fixture(scope="module")
def toy_layout() -> ToyLayoutModel:
    return ToyLayoutModel()


def test_conditions_are_tokens_of_the_layout(toy_layout) -> None:
    board = make_board(toy_layout)
    for items in SCENES:
        (embedded,) = board.conditions([items])
        tokens = embedded.argmax(dim=1)
        assert board.items(tokens) == items
        assert torch.equal(board.table[tokens], embedded)
        layout = toy_layout.layout_format.decode(tokens)
        assert layout.class_ids.tolist() == [item.class_id for item in items]


def test_any_is_the_mean_class(toy_layout) -> None:
    (embedded,) = make_board(toy_layout).conditions([(Item(ANY, Box(0, 0, 1, 1)),)])
    assert torch.allclose(embedded[0, :3], torch.full((3,), 1 / 3))


def test_guided_finds_every_layout(toy_layout) -> None:
    board = make_board(toy_layout)
    for scene, (answer, evaluations) in zip(SCENES, run(toy_layout, board, Guided()), strict=True):
        assert set(answer.items) == set(scene)
        assert answer.loss == pytest.approx(0, abs=1e-6)
        assert 0 < evaluations < 5000


def test_guided_moves_far_on_a_fine_grid() -> None:
    model = ToyLayoutModel(grid=65)
    scene = (Item(1, Box(20, 33, 58, 59)),)
    ((answer, evaluations),) = run(model, make_board(model), Guided(), (scene,))
    assert answer.items == scene and evaluations < 5000


@pytest.mark.parametrize("grid", [2, 3, 4, 5])
def test_guided_on_grids_without_room(grid: int) -> None:
    """Where no side can be moved there is nothing to try."""
    model = ToyLayoutModel(grid=grid)
    whole = Box(0, 0, grid - 1, grid - 1)
    scenes = [(Item(c, whole),) for c in range(3)] + [(Item(1, Box(0, 0, 1, 1)),)]
    answers = run(model, make_board(model), Guided(), scenes)
    assert [answer.items for answer, _ in answers] == scenes


def test_guided_separates_objects_that_touch(toy_layout) -> None:
    scene = (Item(0, Box(0, 0, 2, 2)), Item(2, Box(2, 2, 4, 5)), Item(1, Box(4, 0, 6, 2)))
    ((answer, _),) = run(toy_layout, make_board(toy_layout), Guided(), (scene,))
    assert len(answer.trace["begun"]) == 1
    assert set(answer.items) == set(scene)


def test_guided_with_a_relaxed_search(toy_layout) -> None:
    plain, relaxed = (run(toy_layout, make_board(toy_layout), Guided(starts=n)) for n in (0, 1))
    for scene, (answer, cost), (_, less) in zip(SCENES, relaxed, plain, strict=True):
        assert set(answer.items) == set(scene) and cost > less


@pytest.mark.parametrize("starts", [0, 1])
def test_guided_with_fewer_objects_than_the_model_has_slots(toy_layout, starts: int) -> None:
    board = make_board(toy_layout)
    whole = run(toy_layout, board, Guided(starts=starts))
    for most in (1, 2):
        bounded = run(toy_layout, board, Guided(starts=starts, max_objects=most))
        for scene, (answer, cost), (_, more) in zip(SCENES, bounded, whole, strict=True):
            assert len(answer.items) == min(most, len(scene))
            assert cost < more if len(scene) > most else cost <= more
    many = run(toy_layout, board, Guided(starts=starts, max_objects=100))
    assert [(a.items, cost) for a, cost in many] == [(a.items, cost) for a, cost in whole]


class Company:
    """A prior that only counts objects; the toy's embeddings are one-hot."""

    def __init__(self, price: float, none: int) -> None:
        self.price, self.none = price, none

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        return self.price * (1 - v[:, ::3, self.none]).sum(dim=1)

    def of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.price * (tokens[:, ::3] != self.none).sum(dim=1).double()


def test_slide_finds_the_sides(toy_layout) -> None:
    scene = (Item(1, Box(2, 1, 5, 4)),)
    begin = (Item(1, Box(1, 2, 4, 6)),)
    state = drive(toy_layout, scene, begin, lambda state: state.slide(0, 2))
    assert state.items == scene and state.loss == pytest.approx(0, abs=1e-6)


def test_split_and_join(toy_layout) -> None:
    """Two halves of an object become one, what is not there goes, and else nothing changes.

    Two halves of a box have its image here, so it takes a prior that likes company to split one.
    """
    two = (Item(0, Box(0, 1, 2, 4)), Item(0, Box(4, 1, 6, 4)))
    around, one = (Item(0, Box(0, 1, 6, 4)),), (Item(0, Box(1, 1, 5, 5)),)
    halves_of_one = (Item(0, Box(1, 1, 3, 5)), Item(0, Box(3, 1, 5, 5)))

    def split(state: State):
        return state.split(0)

    company = Company(-0.1, toy_layout.layout_format.none)
    assert set(drive(toy_layout, two, around, split).items) == set(two)
    assert drive(toy_layout, one, one, split).items == one
    parts = drive(toy_layout, one, one, split, company).items
    assert len(parts) == 2 and union(parts[0].box, parts[1].box) == one[0].box
    assert drive(toy_layout, one, halves_of_one, State.join).items == one
    assert set(drive(toy_layout, two, two, State.join).items) == set(two)
    assert drive(toy_layout, (), one, State.join).items == ()


def test_split_all_goes_on_with_the_parts(toy_layout) -> None:
    """One box around three objects in a row, and one that is none in front of it."""
    row = tuple(Item(0, Box(x, 0, x + 2, 2)) for x in (0, 3, 6))
    fine = ToyLayoutModel(max_objects=4, grid=9)
    alone, around = Item(1, Box(0, 5, 3, 8)), Item(0, Box(0, 0, 8, 2))
    found = drive(fine, (alone, *row), (alone, around), State.split_all)
    assert found.items == (alone, *row)


def test_recut_moves_a_border(toy_layout) -> None:
    scene = (Item(0, Box(0, 1, 3, 4)), Item(1, Box(3, 1, 6, 4)))
    wrong = (Item(0, Box(0, 1, 2, 4)), Item(1, Box(2, 1, 6, 4)))
    state = drive(toy_layout, scene, wrong, State.recut)
    assert state.items == scene and state.loss == pytest.approx(0, abs=1e-6)


def test_join_as_class_names_the_whole(toy_layout) -> None:
    scene = (Item(2, Box(1, 1, 5, 5)),)
    parts = (Item(0, Box(1, 1, 3, 5)), Item(1, Box(3, 1, 5, 5)))
    assert drive(toy_layout, scene, parts, State.join_as_class).items == scene


def test_split_as_classes_names_both(toy_layout) -> None:
    """One box around two; a box around one, and a layout without a free slot, stay."""
    two = (Item(2, Box(0, 1, 3, 5)), Item(1, Box(3, 1, 6, 5)))
    around, one = (Item(0, Box(0, 1, 6, 5)),), (Item(2, Box(1, 1, 5, 5)),)
    full = (
        *around,
        *(Item(0, Box(0, 0, 1, 1)) for _ in range(toy_layout.layout_format.max_objects - 1)),
    )

    def split(state: State):
        return state.split_as_classes(0)

    state = drive(toy_layout, two, around, split)
    assert set(state.items) == set(two) and state.loss == pytest.approx(0, abs=1e-6)
    assert drive(toy_layout, one, one, split).items == one
    assert drive(toy_layout, two, full, split).items == full


def test_add_takes_what_explains_more(toy_layout) -> None:
    """The better of two boxes, with its sides moved; where nothing is left none is added."""
    first, second = Item(0, Box(0, 0, 2, 2)), Item(ANY, Box(3, 3, 6, 6))
    boxes = [Box(0, 4, 2, 6), Box(4, 3, 6, 5)]

    def add(state: State):
        return state.add(boxes, 2)

    scene = (first, second._replace(class_id=1))
    assert drive(toy_layout, scene, (first,), add).items == (first, second)
    assert drive(toy_layout, (first,), (first,), add).items == (first,)


def test_classify(toy_layout) -> None:
    items = tuple(item._replace(class_id=ANY) for item in SCENES[2])
    state = drive(toy_layout, SCENES[2], items, State.classify)
    assert state.items == SCENES[2] and state.loss == pytest.approx(0, abs=1e-6)


def test_halves_and_union() -> None:
    box, full = Box(1, 0, 5, 3), torch.ones(6, 6, dtype=torch.bool)
    cuts = halves(box, full)
    assert cuts == [(Box(1, 0, 3, 3), Box(3, 0, 5, 3))]
    assert all(union(*parts) == box for parts in cuts)
    assert halves(Box(0, 0, 3, 3), full) == []
    assert union(Box(0, 0, 1, 1), Box(3, 2, 4, 5)) == Box(0, 0, 4, 5)
    # Parts shrink to what they hold; of a fine grid not every line is tried.
    holds = torch.zeros(6, 6, dtype=torch.bool)
    holds[0:2, 1:3] = holds[1:3, 4:6] = True
    assert halves(Box(0, 0, 6, 3), holds) == [(Box(1, 0, 3, 2), Box(4, 1, 6, 3))]
    assert halves(Box(0, 0, 3, 3), torch.zeros(6, 6, dtype=torch.bool)) == []
    assert len(halves(Box(0, 0, 100, 100), torch.ones(100, 100, dtype=torch.bool))) < 2 * 17


def test_touching() -> None:
    a, beside, below, apart = Box(0, 0, 2, 2), Box(3, 1, 5, 2), Box(0, 2, 2, 4), Box(4, 4, 6, 6)
    boxes = (a, beside, below, apart)
    assert touching(boxes, 7) == [(0, 1), (0, 2), (1, 2)]
    assert (1, 3) in touching(boxes, 65)


def test_decisions_on_fewer_probes_are_those_on_all(toy_layout) -> None:
    """The best class, its loss, and that without the object; each measured on every probe."""
    scene = SCENES[1]

    class Search:
        def search(self, board: Board):
            probe_ids = torch.arange(12)
            short = yield from decide(board, scene, 0, probe_ids)
            layouts = [with_class(scene, 0, c) for c in range(3)] + [scene[1:]]
            full = yield from measure(board, layouts, probe_ids)
            answer = yield from settle(board, (), probe_ids, 0.0)
            answer.trace.update(short=short, full=full)
            return answer

    ((answer, _),) = run(toy_layout, make_board(toy_layout), Search(), (scene,))
    torch.testing.assert_close(answer.trace["short"], answer.trace["full"], rtol=1e-5, atol=1e-7)


def test_invert_finds_a_layout(toy_layout) -> None:
    strategy = InvertLayout(starts=4, steps=80)
    answer, _ = run(toy_layout, make_board(toy_layout), strategy, SCENES[:1])[0]
    (item,) = answer.items
    assert item.class_id == SCENES[0][0].class_id
    # A relaxed search may end a step beside the truth.
    assert overlap(item.box, SCENES[0][0].box) >= 0.5


def test_corners_by_themselves_may_make_no_box(toy_layout) -> None:
    """Such objects are left out; with the joint projection there are none."""
    found = {}
    for joint in (True, False):
        strategy = InvertLayout(starts=8, steps=3, joint_boxes=joint, settled=False)
        answer, _ = run(toy_layout, make_board(toy_layout), strategy, SCENES[2:3])[0]
        found[joint] = answer.trace["found"]
    assert len(found[False]) < len(found[True])


def test_losses_of_an_answer_are_leave_one_out(toy_layout) -> None:
    board = make_board(toy_layout)
    answer, _ = run(toy_layout, board, Guided(), SCENES[1:2])[0]
    assert answer.losses.shape == (2, 4)
    for item, row in zip(answer.items, answer.losses, strict=True):
        assert int(row.argmin()) == item.class_id
        assert row[-1] > row[item.class_id]


def test_alone_as_in_a_batch(toy_layout) -> None:
    board = make_board(toy_layout)
    for strategy in (Guided(), InvertLayout(steps=10)):
        together = run(toy_layout, board, strategy)
        for scene, (answer, evaluations) in zip(SCENES, together, strict=True):
            alone, cost = run(toy_layout, board, strategy, [scene], batch_size=7)[0]
            assert alone.items == answer.items and cost == evaluations


def test_a_penalty_on_objects_removes_them(toy_layout) -> None:
    """A prior that finds every object far too unlikely leaves none."""
    board = make_board(toy_layout, Company(100, toy_layout.layout_format.none))
    for strategy in (Guided(), InvertLayout(steps=5)):
        assert all(answer.items == () for answer, _ in run(toy_layout, board, strategy))


def test_duplicates_go() -> None:
    a, near, far = Box(0, 0, 4, 4), Box(0, 0, 4, 3), Box(2, 2, 6, 6)
    items = (Item(0, a), Item(1, near), Item(0, far))
    assert overlap(a, near) == 0.75 and overlap(a, far) == pytest.approx(4 / 28)
    assert drop_duplicates(items) == (items[0], items[2])


def test_neighbours_stay_on_the_grid_and_keep_a_size() -> None:
    found = neighbours(Box(0, 0, 1, 3), 1, 4)
    assert Box(0, 0, 2, 3) in found and Box(1, 0, 2, 3) in found
    assert all(0 <= b.left < b.right < 4 and 0 <= b.top < b.bottom < 4 for b in found)
    assert Box(1, 0, 1, 3) not in found


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Guided(rough_probes=0), "rough_probes must be at least 1"),
        (lambda: Guided(max_objects=0), "max_objects must be at least 1, got 0"),
        (lambda: Guided(margin=1), "margin must be in"),
        (lambda: Guided(step_probes=0), "step_probes must be at least 1"),
        (lambda: InvertLayout(steps=0), "steps must be at least 1"),
        (lambda: InvertLayout(learning_rate=0), "learning_rate must be above 0"),
        (lambda: InvertLayout(margin=-1), "margin must be in"),
    ],
)
def test_bad_settings(make, said: str) -> None:
    with pytest.raises(DiveFastError, match=said):
        make()


@dataclass(frozen=True)
class OneBox(LayoutProbes):
    """An object of the first class, wherever it is told to be."""

    name: ClassVar[str] = "one-box"
    side: int = 2
    loss: str = "l2"

    def search(self, board: Board):
        return (
            yield from settle(
                board, (Item(0, Box(0, 0, self.side, self.side)),), torch.arange(6), 0.0
            )
        )


def test_strategies_register_from_outside(toy_layout, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_STRATEGIES", dict(registry._STRATEGIES))
    register_layout_strategy("one-box", OneBox())
    assert layout_strategy_names() == ("guided", "invert", "one-box")
    scene = (Item(0, Box(0, 0, 3, 3)),)
    for arguments, side in [(("one-box", {}), 2), (("one-box", {"side": 3}), 3)]:
        strategy = resolve_layout_strategy(*arguments)
        ((answer, _),) = run(toy_layout, make_board(toy_layout), strategy, [scene])
        assert answer.items == (Item(0, Box(0, 0, side, side)),)


def test_bad_names_and_settings() -> None:
    with pytest.raises(DiveFastError, match="layouts of guided, invert, got 'race'"):
        resolve_layout_strategy("race", {})
    with pytest.raises(DiveFastError, match="unknown setting 'stop': InvertLayout has starts"):
        resolve_layout_strategy("invert", {"stop": 1})
    assert resolve_layout_strategy(None, {}) == Guided()
    assert resolve_layout_strategy(Guided(rounds=1), {"margin": 0.5}) == Guided(
        rounds=1, margin=0.5
    )
