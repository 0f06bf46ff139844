"""The zoo's layout-to-image model on held-out scenes."""

from __future__ import annotations

import json

import pytest
import torch

from dive_fast import LayoutDetector, zoo
from dive_fast.cli.demo_scenes import as_line, run_detection_demo
from dive_fast.data.scenes import STEP, load_scenes
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.predict.matching import match
from dive_fast.priors import LayoutPenalty
from dive_fast.strategies.layout import Board, Box, Guided, Item
from dive_fast.strategies.layout.board import measure

N, PROBES = 24, 12


@pytest.fixture(scope="module")
def detector() -> LayoutDetector:
    return LayoutDetector.from_pretrained("scenes")


def true_layout(made, scene: int) -> tuple[Item, ...]:
    pairs = zip(made.class_ids[scene].tolist(), made.boxes[scene].tolist(), strict=True)
    return tuple(Item(c, Box(*(side // STEP for side in box))) for c, box in pairs if c >= 0)


def changed(items: tuple[Item, ...]) -> list[tuple[Item, ...]]:
    """As it is, without the first object, of another class, four pixels aside, and twice."""
    (c, box), rest = items[0], items[1:]
    aside = -2 if box.right > 14 else 2
    there = box._replace(left=box.left + aside, right=box.right + aside)
    return [items, rest, (Item((c + 5) % 10, box), *rest), (Item(c, there), *rest)]


def test_the_true_layout_explains_a_scene_best(detector: LayoutDetector) -> None:
    """Losses without the prior, on common probes: what detection rests on."""
    model, made = detector.model, load_scenes("test", N)
    probes = Guided().probes(PROBES, len(model.schedule), model.latent_shape, 0)
    board = Board(model.vocabulary.table, model.layout_format, probes)
    x0 = model.encode(torch.from_numpy(made.images).float()[:, None] / 127.5 - 1)

    class Measured:
        def search(self, items):
            return measure(board, changed(items), torch.arange(PROBES))

    jobs = [Job(i, x0[i], Measured().search(true_layout(made, i))) for i in range(N)]
    found = Engine(model, 128).run(jobs, probes, Objective())
    losses = torch.stack([f.answer for f in sorted(found, key=lambda f: f.key)])
    better = (losses[:, :1] < losses[:, 1:]).double().mean(dim=0)
    removed, renamed, shifted = better.tolist()
    assert removed == 1 and shifted >= 0.95 and renamed >= 0.9


def test_the_prior_is_the_model_s_own(detector: LayoutDetector) -> None:
    """Scenes as they are made are more usual than a sliver, and than one digit twice."""
    assert detector.prior is not None
    model, made = detector.model, load_scenes("test", 40)
    penalty = LayoutPenalty(detector.prior, 1.0, 8, model.layout_format)
    board = Board(model.vocabulary.table, model.layout_format, None, penalty=penalty)
    scenes = [s for s in (true_layout(made, i) for i in range(40)) if len(s) < 4]
    slivers = [(*s, Item(3, Box(2, 2, 3, 12))) for s in scenes]
    twice = [(*s, s[0]) for s in scenes]
    usual, thin, double = (board.price(layouts) for layouts in (scenes, slivers, twice))
    assert (usual < thin).double().mean() > 0.9 and (usual < double).double().mean() > 0.8


def test_demo(tmp_path) -> None:
    """One image; what is found is written, drawn, and found again without a search."""
    found = run_detection_demo(tmp_path, limit=1, progress=False)
    assert found["n"] == 1 and 0 < found["evaluations_per_image"] < 10_000
    assert "1 images" in as_line(found)
    assert json.loads((tmp_path / "scenes.json").read_text()) == found
    assert (tmp_path / "scenes.png").stat().st_size > 1000
    (line,) = (tmp_path / "scenes" / "results.jsonl").read_text().splitlines()
    assert run_detection_demo(tmp_path, limit=1, progress=False) == found
    record = json.loads(line)
    truth = torch.tensor([item.box for item in true_layout(load_scenes("test", 1), 0)]) * STEP
    boxes, confidence = (torch.tensor(record[key]) for key in ("boxes", "confidences"))
    assert (match(boxes, confidence, truth) >= 0).sum() >= 2  # of three digits


def test_it_says_how_it_was_made() -> None:
    facts = json.loads((zoo.path("scenes") / "dive_fast.json").read_text())
    assert facts["command"].startswith("dive-fast train scenes")
    assert facts["expected"]["layout"] < 0.1 * facts["expected"]["empty"]
    prior = json.loads((zoo.path("scenes") / "prior" / "dive_fast.json").read_text())
    assert prior["command"].startswith("dive-fast train-prior") and prior["annotations"] == "scenes"
