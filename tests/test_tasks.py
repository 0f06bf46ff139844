"""Runs over tasks, and ``dive-fast tasks``: what they compute, write, go on with and refuse."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from diffusers import AutoencoderKL, UNet2DConditionModel
from task_inputs import lengthen, write_pair_task, write_twice_task
from transformers import CLIPTextModel, CLIPTokenizer

from dive_fast import DiveFastError, ImageTextScorer, RunError
from dive_fast.data.images import image_to_tensor
from dive_fast.data.tasks import TaskSpec, open_task
from dive_fast.evaluation import evaluate_task, read_records
from dive_fast.strategies import Enumerate

PROBES = 6


@pytest.fixture(scope="module")
def scorer(sd: Path) -> ImageTextScorer:
    return ImageTextScorer.from_pretrained(sd)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    write_pair_task(tmp_path / "data")
    return tmp_path / "data"


def plain_loss(sd: Path, scorer: ImageTextScorer, image, text: str) -> float:
    """|| eps - eps_theta(x_t, t, text) ||^2 / dim, mean over the probes, by the classes alone."""
    vae = AutoencoderKL.from_pretrained(sd / "vae")
    unet = UNet2DConditionModel.from_pretrained(sd / "unet").eval()
    tokenizer = CLIPTokenizer.from_pretrained(sd / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(sd / "text_encoder").eval()
    config = json.loads((sd / "scheduler" / "scheduler_config.json").read_text())
    assert config["beta_schedule"] == "scaled_linear" and config["prediction_type"] == "epsilon"
    beta = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000) ** 2
    alpha_bar = (1 - beta).cumprod(0)
    probes = scorer.probe_list(Enumerate(), PROBES)
    ids = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        pixels = image_to_tensor(image, 16, 3)[None]
        x0 = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        condition = encoder(ids)[0]
        losses = []
        for t, eps in zip(probes.timesteps, probes.noise[probes.noise_index], strict=True):
            x_t = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * eps
            losses.append(((unet(x_t, t, condition).sample - eps) ** 2).mean())
    return torch.stack(losses).mean().item()


def test_scores_are_those_of_a_plain_loop(sd: Path, scorer, pairs: Path, tmp_path: Path) -> None:
    data = open_task(pairs / "pair.json", pairs)
    found = evaluate_task(scorer, data, tmp_path / "run", strategy="enumerate", probes=PROBES)
    records = read_records(tmp_path / "run")
    right = 0
    for number, item in enumerate(data.items):
        image = data.pictures.image(f"{number}.png")
        expected = [plain_loss(sd, scorer, image, text) for text in item.texts]
        assert records[item.id]["losses"][0] == pytest.approx(expected, rel=1e-4)
        assert records[item.id]["right"] == {"text": expected[0] < expected[1]}
        right += expected[0] < expected[1]
    assert found.n == 5 and found.scores["text"].right == right
    assert found.evaluations_per_item == 2 * PROBES


def test_two_images_and_two_texts(sd: Path, scorer, tmp_path: Path) -> None:
    spec = write_twice_task(tmp_path / "data")
    data = open_task(spec, tmp_path / "data")
    found = evaluate_task(scorer, data, tmp_path / "run", probes=PROBES)
    raw = evaluate_task(scorer, data, tmp_path / "raw", probes=PROBES, image_rule="raw")
    rights = {"text": 0, "image": 0, "group": 0}
    records = read_records(tmp_path / "run")
    for item in data.items:
        pictures = [data.pictures.image(name) for name in item.images]
        # L, and behind it the loss without a text, by the same plain loop.
        losses = np.array(
            [[plain_loss(sd, scorer, p, t) for t in (*item.texts, "")] for p in pictures]
        )
        s = losses[:, :2] - losses[:, 2:]
        text = losses[0, 0] < losses[0, 1] and losses[1, 1] < losses[1, 0]
        image = s[0, 0] < s[1, 0] and s[1, 1] < s[0, 1]
        record = records[item.id]
        assert record["right"] == {"text": text, "image": image, "group": text and image}
        assert np.array(record["losses"]) == pytest.approx(losses[:, :2], rel=1e-4)
        assert record["null_losses"] == pytest.approx(losses[:, 2], rel=1e-4)
        for name, value in record["right"].items():
            rights[name] += value
        alone = losses[0, 0] < losses[1, 0] and losses[1, 1] < losses[0, 1]
        assert read_records(tmp_path / "raw")[item.id]["right"]["image"] == alone
    with pytest.raises(DiveFastError, match="expected the strategy enumerate or none, got race"):
        evaluate_task(scorer, data, tmp_path / "other", strategy="race")
    assert {name: score.right for name, score in found.scores.items()} == rights
    assert set(found.categories) == {"even", "odd"}
    assert found.categories["even"]["group"].n == 2
    assert found.evaluations_per_item == 6 * PROBES and raw.evaluations_per_item == 4 * PROBES


def test_what_lies_in_the_run(scorer, pairs: Path, tmp_path: Path) -> None:
    data = open_task(pairs / "pair.json", pairs)
    found = evaluate_task(scorer, data, tmp_path / "run", probes=PROBES)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["scores"] == found.to_dict()["scores"] and summary["task"] == "pair"
    assert summary["config"]["strategy"]["name"] == "auto"
    with open(tmp_path / "run" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [item.id for item in data.items]
    assert sum(int(row["text"]) for row in rows) == found.scores["text"].right
    # The same again computes nothing; another configuration is refused.
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert evaluate_task(scorer, data, tmp_path / "run", probes=PROBES) == found
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before
    with pytest.raises(RunError, match="probes is 6 there and 5 here"):
        evaluate_task(scorer, data, tmp_path / "run", probes=PROBES - 1)
    items = json.loads((pairs / "items.json").read_text())
    items["k0"]["right"] = "a cow"
    (pairs / "items.json").write_text(json.dumps(items))
    with pytest.raises(RunError, match="files is "):
        changed = open_task(pairs / "pair.json", pairs)
        evaluate_task(scorer, changed, tmp_path / "run", probes=PROBES)


def test_a_part_of_the_items(scorer, pairs: Path, tmp_path: Path) -> None:
    data = open_task(pairs / "pair.json", pairs)
    found = evaluate_task(scorer, data, tmp_path / "run", probes=4, limit=2, seed=3)
    assert found.n == 2 and len(read_records(tmp_path / "run")) == 2
    with pytest.raises(DiveFastError, match="limit of at least 1 item, got 0"):
        evaluate_task(scorer, data, tmp_path / "other", limit=0)
    with pytest.raises(DiveFastError, match="image_rule 'null' or 'raw', got 'both'"):
        evaluate_task(scorer, data, tmp_path / "other", image_rule="both")
    assert not (tmp_path / "other").exists()


def test_an_image_that_is_missing_or_damaged(scorer, pairs: Path, tmp_path: Path) -> None:
    (pairs / "images" / "1.png").unlink()
    (pairs / "images" / "3.png").write_bytes(b"\x89PNG torn")
    data = open_task(pairs / "pair.json", pairs)
    found = evaluate_task(scorer, data, tmp_path / "run", probes=PROBES)
    assert (found.n, found.failed) == (3, 2)
    records = read_records(tmp_path / "run")
    assert "has no file '1.png'" in records["k1"]["error"] and "error" in records["k3"]
    # When it is there the run goes on with it.
    (pairs / "images" / "1.png").write_bytes((pairs / "images" / "2.png").read_bytes())
    again = open_task(pairs / "pair.json", pairs)
    assert evaluate_task(scorer, again, tmp_path / "run", probes=PROBES).n == 4


def test_texts_that_are_the_same_to_the_model(scorer, pairs: Path, tmp_path: Path) -> None:
    """The tokenizer reads 16 tokens: what differs behind them is no difference."""
    items = json.loads((pairs / "items.json").read_text())
    items["k2"] |= {"right": "a" * 40 + "b", "wrong": "a" * 40 + "c"}
    (pairs / "items.json").write_text(json.dumps(items))
    data = open_task(pairs / "pair.json", pairs)
    found = evaluate_task(scorer, data, tmp_path / "run", probes=PROBES)
    assert (found.n, found.failed) == (4, 1)
    assert "the same to it" in read_records(tmp_path / "run")["k2"]["error"]


def test_the_published_items_on_random_weights(sd: Path, real_data, tmp_path: Path) -> None:
    """The open part of SugarCrepe, as a user's own file says it."""
    spec = TaskSpec.from_dict(
        {
            "name": "sugarcrepe-open",
            "items": "sugarcrepe_open_subset.json",
            "images": "file",
            "texts": ["caption", "negative_caption"],
            "category": "category",
        },
        "here",
    )
    data = open_task(
        spec,
        real_data("vl_sugarcrepe_open.zip"),
        real_data("det80_coco_val2017_open_320px.zip"),
    )
    assert len(data.items) == 1107
    scorer = ImageTextScorer.from_pretrained(lengthen(sd, tmp_path / "long"))
    found = evaluate_task(scorer, data, tmp_path / "run", probes=4, limit=6)
    assert (found.n, found.failed) == (6, 0)
    assert sum(score["text"].n for score in found.categories.values()) == 6


# -- the command -----------------------------------------------------------------------------------


def test_the_list(capsys) -> None:
    said = call(capsys, "tasks")
    assert said.code == 0 and "sugarcrepe" in said.out and "winoground" in said.out
    said = call(capsys, "tasks", "winoground")
    assert said.code == 0 and "2204.03162" in said.out and "licence" in said.out
    listed = json.loads(call(capsys, "tasks", "--json").out)
    assert [task["name"] for task in listed] == ["sugarcrepe", "winoground"]


def test_the_command_runs_one(capsys, sd: Path, pairs: Path, tmp_path: Path) -> None:
    (pairs / "images" / "4.png").unlink()
    common = ("tasks", pairs / "pair.json", "--data", pairs, "--model", sd, "--probes", PROBES)
    said = call(capsys, *common, "--out", tmp_path / "run")
    assert said.code == 2 and "items that failed      1" in said.out, said
    assert "has no file '4.png'" in said.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    share = summary["scores"]["text"]["share"]
    assert f"{share:.1%} [" in said.out
    said = call(capsys, *common, "--out", tmp_path / "e", "--strategy", "enumerate", "--json")
    assert json.loads(said.out)["evaluations_per_item"] == 2 * PROBES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "a task of sugarcrepe, winoground"),
        (["sugarcrepe", "--data", "."], "expected --out to run the task sugarcrepe"),
        (["sugarcrepe", "--out", "x"], "expected --data to run the task sugarcrepe"),
        (["sugarcrepe", "--data", ".", "--out", "x"], "expected --model"),
        (["sugarcrepe", "--limit", "0"], "at least 1"),
        (["sugarcrepe", "--image-rule", "both"], "invalid choice"),
        (["sugarcrepe", "--data", "gone", "--out", "x", "--model", "y"], "gone.*nothing is there"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_command_refuses(capsys, arguments: list[str], message: str) -> None:
    assert_refused(call(capsys, "tasks", *arguments), message)


def test_other_commands_refuse_its_runs(capsys, scorer, pairs: Path, tmp_path: Path) -> None:
    evaluate_task(scorer, open_task(pairs / "pair.json", pairs), tmp_path / "run", probes=2)
    run = tmp_path / "run"
    for command in (["compare-runs", run, run], ["report", run, "--out", tmp_path / "r.html"]):
        assert_refused(call(capsys, *command), "got one of a task")


def test_it_goes_on_after_a_kill(sd: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    spec = write_pair_task(data, 30)
    command = [sys.executable, "-m", "dive_fast", "tasks", spec, "--data", data, "--model", sd]
    command += ["--probes", "40", "--strategy", "enumerate", "--batch-size", "16"]
    root = Path(__file__).parents[1]
    results = tmp_path / "run" / "results.jsonl"
    process = subprocess.Popen(
        [*map(str, command), "--out", str(tmp_path / "run")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    while process.poll() is None and (not results.exists() or results.stat().st_size == 0):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = results.read_bytes().count(b"\n")
    assert 0 < there < 30
    scorer = ImageTextScorer.from_pretrained(sd, batch_size=16)
    asked = {"strategy": "enumerate", "probes": 40}
    items = open_task(spec, data)
    gone_on = evaluate_task(scorer, items, tmp_path / "run", **asked)
    whole = evaluate_task(scorer, items, tmp_path / "whole", **asked)
    found, expected = (read_records(tmp_path / name) for name in ("run", "whole"))
    assert found.keys() == expected.keys() and len(found) == 30
    for key, record in expected.items():
        assert found[key]["right"] == record["right"]
        assert found[key]["losses"][0] == pytest.approx(record["losses"][0], rel=1e-5)
    assert gone_on.scores == whole.scores
    assert len(results.read_bytes().splitlines()) == 30
