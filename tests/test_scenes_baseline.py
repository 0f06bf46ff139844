"""The discriminative baseline of the scenes: targets, boxes and back, suppression, training."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from cut_off import cut_off

from bench import scenes_baseline
from bench.baselines import one_stage
from bench.baselines.one_stage import Dense, Found, assign, centres, decode, detection_loss, nms
from bench.scenes_baseline import BaselineConfig, coco_scores, load_detector, main, train
from dive_fast.data.scenes import CANVAS, NAMES, load_scenes
from dive_fast.evaluation.coco_scores import NAMES as NUMBERS

pytest.importorskip("sklearn", reason="the scenes show scikit-learn's digits")
pytest.importorskip("pycocotools", reason="the COCO numbers come with the extra detect")

TINY = BaselineConfig(
    channels=(4, 6, 8), blocks=(1, 2, 1), width=8, steps=4, batch_size=4, warmup_steps=2
)


@pytest.fixture(autouse=True, scope="module")
def few_watched():
    """The AP in the log is that of few scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_baseline, "WATCHED", 3)
        yield


@contextlib.contextmanager
def cut_at_batch(number):
    """A training inside is cut off in the middle of a step."""
    batches, loss = itertools.count(1), scenes_baseline._loss
    with pytest.MonkeyPatch.context() as patch, cut_off() as ctrl_c:

        def cut(*arguments):
            if next(batches) == number:
                ctrl_c()
            return loss(*arguments)

        patch.setattr(scenes_baseline, "_loss", cut)
        yield


def padded(objects):
    """Boxes [1, 4, 4] and class ids [1, 4] of one scene's (class, box)."""
    boxes, class_ids = torch.zeros(1, 4, 4), torch.full((1, 4), -1)
    for i, (c, box) in enumerate(objects):
        class_ids[0, i], boxes[0, i] = c, torch.tensor(box)
    return boxes, class_ids


def cells_of(targets, c):
    """The centres of the cells of a class, as a set."""
    return {tuple(p) for p in centres(CANVAS, CANVAS)[targets.class_ids[0] == c].tolist()}


def perfect(targets):
    """The network's outputs that say just what the targets ask for."""
    chosen = targets.class_ids >= 0
    logits = torch.full((*chosen.shape, len(NAMES)), -20.0)
    logits[chosen, targets.class_ids[chosen]] = 20.0
    points = centres(CANVAS, CANVAS)
    distances = torch.cat([points - targets.boxes[..., :2], targets.boxes[..., 2:] - points], dim=2)
    return Dense(logits, torch.where(chosen[..., None], distances, 1.0))


def test_cells_near_a_centre_answer_for_the_object():
    targets = assign(*padded([(3, (8, 8, 16, 18)), (7, (20, 0, 24, 8))]), CANVAS, CANVAS)
    # Its middle is (12, 13), and less than three pixels from there are these cells' centres.
    assert cells_of(targets, 3) == {(x, y) for x in (11, 13) for y in (11, 13, 15)}
    # A narrow one: all cells near its middle (22, 4) that lie inside.
    assert cells_of(targets, 7) == {(x, y) for x in (21, 23) for y in (3, 5)}
    assert (targets.class_ids >= 0).sum() == 10
    assert (targets.boxes[targets.class_ids == 3] == torch.tensor([8.0, 8, 16, 18])).all()
    assert (targets.boxes[targets.class_ids == 7] == torch.tensor([20.0, 0, 24, 8])).all()


def test_the_smaller_of_two_objects_has_the_cell():
    large, small = (0, (0, 0, 16, 18)), (1, (6, 4, 12, 14))
    for objects in ([large, small], [small, large]):
        targets = assign(*padded(objects), CANVAS, CANVAS)
        # The middles are (8, 9) and (9, 9).
        assert cells_of(targets, 1) == {(x, y) for x in (7, 9, 11) for y in (7, 9, 11)}
        assert cells_of(targets, 0) == set()


def test_every_object_of_the_scenes_has_a_cell():
    made = load_scenes("test", 100)
    boxes, class_ids = torch.from_numpy(made.boxes).float(), torch.from_numpy(made.class_ids)
    targets = assign(boxes, class_ids, CANVAS, CANVAS)
    same = (targets.boxes[:, None] == boxes[:, :, None]).all(dim=3)
    has_cell = (same & (targets.class_ids[:, None] == class_ids[:, :, None])).any(dim=2)
    assert has_cell[class_ids >= 0].all()
    assert ((targets.class_ids >= 0).any(dim=1) == torch.from_numpy(made.counts > 0)).all()


def test_what_the_targets_say_scores_one():
    made = load_scenes("test", 40)
    boxes, class_ids = torch.from_numpy(made.boxes).float(), torch.from_numpy(made.class_ids)
    dense = perfect(assign(boxes, class_ids, CANVAS, CANVAS))
    found = decode(dense, CANVAS, CANVAS)
    assert [len(one.boxes) for one in found] == made.counts.tolist()
    assert coco_scores(found, made)["AP"] == pytest.approx(1.0)
    # Moved by two pixels they score less: the number does look at the boxes.
    moved = [Found(one.boxes + 2, one.class_ids, one.scores) for one in found]
    assert coco_scores(moved, made)["AP"] < 0.5


def test_the_loss_is_least_where_the_targets_are():
    boxes, class_ids = padded([(3, (8, 8, 16, 18))])
    targets = assign(boxes, class_ids, CANVAS, CANVAS)
    right = perfect(targets)
    assert detection_loss(right, targets, CANVAS, CANVAS) < 1e-5
    wrong_class = Dense(right.logits.roll(1, dims=2), right.distances)
    wrong_box = Dense(right.logits, right.distances + 1)
    for wrong in (wrong_class, wrong_box):
        assert detection_loss(wrong, targets, CANVAS, CANVAS) > 0.1


def test_scenes_without_objects_have_a_loss_and_a_gradient():
    targets = assign(*padded([]), CANVAS, CANVAS)
    logits = torch.zeros(1, 256, len(NAMES), requires_grad=True)
    distances = torch.ones(1, 256, 4, requires_grad=True)
    detection_loss(Dense(logits, distances), targets, CANVAS, CANVAS).backward()
    assert (logits.grad > 0).all()
    assert (distances.grad == 0).all()


def test_generalised_iou():
    a = torch.tensor([0.0, 0, 2, 2])
    for b, iou, giou in (
        ((0, 0, 2, 2), 1.0, 1.0),
        ((1, 0, 3, 2), 1 / 3, 1 / 3),
        ((1, 1, 3, 3), 1 / 7, 1 / 7 - 2 / 9),
        ((4, 0, 6, 2), 0.0, -4 / 12),
    ):
        found = one_stage._overlap(a, torch.tensor(b).float())
        torch.testing.assert_close(torch.stack(found), torch.tensor([iou, giou]))


def test_suppression_keeps_the_best_of_each_heap():
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [1, 0, 11, 10], [3, 0, 13, 10], [20, 0, 30, 10], [20, 0, 30, 11]]
    )
    scores = torch.tensor([0.8, 0.9, 0.7, 0.5, 0.6])
    # 0 and 2 overlap with 1 by 9/11 and 8/12; 3 with 4 by 10/11.
    assert nms(boxes, scores, 0.6).tolist() == [1, 4]
    assert nms(boxes, scores, 0.7).tolist() == [1, 2, 4]
    assert nms(boxes, scores, 0.99).tolist() == [1, 0, 2, 4, 3]
    # What is suppressed suppresses nothing: 2 overlaps with 0 by 7/13 and goes by 1 alone.
    assert nms(boxes[[0, 2]], scores[[0, 2]], 0.6).tolist() == [0, 1]
    assert nms(boxes[:0], scores[:0], 0.6).tolist() == []


def test_objects_of_two_classes_in_one_place_both_stay():
    logits = torch.full((1, 256, 2), -20.0)
    logits[0, 100] = torch.tensor([1.0, 2.0])
    logits[0, 101] = torch.tensor([0.0, -20.0])  # nearly the same box as 100's
    distances = torch.full((1, 256, 4), 8.0)
    (found,) = decode(Dense(logits, distances), CANVAS, CANVAS)
    assert found.class_ids.tolist() == [1, 0]
    torch.testing.assert_close(found.scores, torch.tensor([2.0, 1.0]).sigmoid())


def test_boxes_are_cut_at_the_edges_and_at_most_100():
    logits, distances = torch.zeros(1, 256, 10), torch.full((1, 256, 4), 3.0)
    (found,) = decode(Dense(logits, distances), CANVAS, CANVAS)
    assert len(found.boxes) == one_stage.MAX_DETECTIONS
    assert found.boxes.min() == 0 and found.boxes.max() <= CANVAS


def test_a_picture_that_is_no_square():
    net = TINY.build().eval()
    with torch.inference_mode():
        dense = net(torch.zeros(2, 1, 24, 40))
    assert dense.logits.shape == (2, 240, 10) and dense.distances.shape == (2, 240, 4)
    assert (dense.distances > 0).all()
    assert centres(24, 40)[[0, 1, 20, -1]].tolist() == [[1, 1], [3, 1], [1, 3], [39, 23]]


def test_a_batch_can_be_learned():
    torch.manual_seed(0)
    net, made = TINY.build().train(), load_scenes("train", 8)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = scenes_baseline._loss(net, made, TINY)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_training_that_was_cut_off_ends_as_one_that_was_not(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, TINY)
    shown = capsys.readouterr().err
    assert "4/4 [" in shown and "loss=" in shown
    (line,) = (json.loads(line) for line in (whole / "training.jsonl").read_text().splitlines())
    assert line["step"] == 4 and line["loss"] > 0 and 0 <= line["AP"] <= 1

    with cut_at_batch(2):
        train(cut, TINY, progress=False)
    assert not (cut / "detector.pt").exists()
    assert torch.load(cut / "training.pt", weights_only=True)["step"] == 2
    train(cut, TINY, progress=False)
    (net, facts), (other, _) = load_detector(whole), load_detector(cut)
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert facts["steps"] == 4 and facts["training"]["cpu_seconds"] > 0
    assert not (whole / "training.pt").exists()


def test_bf16(tmp_path):
    train(tmp_path, dataclasses.replace(TINY, bf16=True), progress=False)
    net, _ = load_detector(tmp_path)
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in net.parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("detector")
    train(directory, TINY, progress=False)
    return directory


def test_score_prints_and_records(trained, tmp_path, capsys):
    record = tmp_path / "new" / "scores.jsonl"
    for _ in range(2):
        assert main(["score", "--model", str(trained), "--limit", "3", "--out", str(record)]) == 0
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(rows) == 2
    assert tuple(rows[0]["scores"]) == tuple(rows[0]["scores_on_grid"]) == NUMBERS
    assert rows[0]["n"] == 3 and rows[0]["steps"] == 4 and rows[0]["seconds_per_image"] > 0
    assert rows[0]["parameters"] == sum(p.numel() for p in TINY.build().parameters())
    assert "pycocotools" in rows[0]["environment"] and "commit" in rows[0]["environment"]
    assert rows[0]["scores"] == rows[1]["scores"]
    assert json.loads(capsys.readouterr().out.split("\n}\n")[0] + "}")["n"] == 3


def test_bad_input_is_refused_in_one_sentence(trained, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "detector.pt").write_bytes(b"no detector")
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "nowhere")
    for arguments, message in (
        (["score", "--model", str(trained), "--limit", "0"], "at least 1 scene, got 0"),
        (["score", "--model", nowhere], "finished detector in .*nowhere, got no detector.pt"),
        (["score", "--model", str(damaged)], "is damaged"),
        (["score", "--model", str(trained), "--limit", "1", "--out", str(tmp_path)], "written"),
        (["train", "--out", nowhere, "--steps", "0"], "at least 1 step, got 0"),
        (["train", "--out", str(trained)], "holds a finished detector"),
        (["train", "--out", str(tmp_path / "file")], "cannot be made a directory"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line
        assert line.startswith("scenes_baseline: ") and line.endswith((".", "?"))
    assert not Path(nowhere).exists()


def test_another_training_in_the_directory_is_refused(tmp_path):
    with cut_at_batch(1):
        train(tmp_path, TINY, progress=False)
    with pytest.raises(scenes_baseline.RunError, match="another configuration"):
        train(tmp_path, dataclasses.replace(TINY, seed=1), progress=False)
