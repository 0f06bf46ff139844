"""Precision, compilation and memory layout of the engine: the same answers, everywhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from PIL import Image
from tiny import NAMES
from tiny_transformer import make_dit

from dive_fast import DiffusionClassifier, DiveFastError, RunError
from dive_fast.data import open_dataset
from dive_fast.engine import EngineOptions
from dive_fast.evaluation import evaluate

LEVELS = ("off", "exact", "encoder")


def classifier(*, layers: int = 2, **options) -> DiffusionClassifier:
    model = make_dit(layers=layers)
    return DiffusionClassifier(model, batch_size=24, options=EngineOptions(**options))


def latents(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(2))


def losses(**options) -> torch.Tensor:
    return classifier(**options).losses(latents=latents(), probes=6)


def test_autocast_is_what_torch_autocast_gives():
    clf = classifier(cache="off")
    plain = clf.losses(latents=latents(), probes=6)
    predict = clf.model.predict

    def by_hand(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return predict(*arguments)

    clf.model.predict = by_hand
    expected = clf.losses(latents=latents(), probes=6)
    assert not torch.allclose(expected, plain, rtol=1e-4, atol=1e-5)
    for level in LEVELS:
        found = losses(cache=level, autocast="bfloat16")
        assert found.dtype == torch.float32
        # Batches cut otherwise: a few of bfloat16's roundings, 2^-8 each.
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_under_autocast_find_the_classes(level):
    answers = classifier(cache=level, autocast="bfloat16")(latents=latents(), probes=12)
    for answer in answers:
        assert answer.losses.dtype == torch.float32 and answer.n_probes.max() > 0


@pytest.mark.parametrize("level", LEVELS)
def test_channels_last_lays_out_weights_and_inputs_and_changes_nothing(level):
    clf = classifier(cache=level, channels_last=True)
    seen = []
    part = "predict" if level == "off" else "prefix"
    function = getattr(clf.model, part)
    setattr(clf.model, part, lambda x_t, *rest: (seen.append(x_t), function(x_t, *rest))[1])
    found = clf.losses(latents=latents(), probes=6)
    torch.testing.assert_close(found, losses(cache="off"), rtol=1e-4, atol=1e-5)
    weight = clf.model.network.pos_embed.proj.weight
    for tensor in (weight, *seen):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@pytest.mark.skipif(compiler() is None, reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_losses_are_the_plain_ones():
    # One batch of 20 rows and one block: every other size or kernel would be compiled anew.
    found, expected = (
        classifier(layers=1, cache="off", compile=compile).losses(latents=latents(1), probes=4)
        for compile in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["off", "encoder"])
def test_every_part_is_compiled_and_searches_go_through_it(level, monkeypatch):
    """With a backend that runs the traced graph as it is: tracing is what could go wrong here."""
    compile, names = torch.compile, []

    def traced(function):
        names.append(function.__name__)
        return compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    found = classifier(cache=level, compile=True)(latents=latents(), probes=8)
    expected = classifier(cache=level)(latents=latents(), probes=8)
    assert names == (["predict"] if level == "off" else ["prefix", "project", "encoder", "decoder"])
    for a, b in zip(found, expected, strict=True):
        assert (a.index, a.evaluations) == (b.index, b.evaluations)
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_compiler_that_fails_is_one_sentence(monkeypatch):
    compile = torch.compile

    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend=broken))
    with pytest.raises(
        DiveFastError, match="^torch.compile failed; go on without compile: .*"
    ) as e:
        losses(cache="off", compile=True)
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    for i, array in enumerate(pixels):
        (root / NAMES[i]).mkdir()
        Image.fromarray(array).save(root / NAMES[i] / f"{i}.png")
    return root


def test_from_pretrained_takes_the_options_by_name(dit_dir):
    clf = DiffusionClassifier.from_pretrained(dit_dir, cache="encoder", refresh=3, cache_bytes=99)
    assert clf.options == EngineOptions(cache="encoder", refresh=3, cache_bytes=99)
    assert clf.last_run.batches == 0 and clf.last_run.fill_rate is None
    with pytest.raises(TypeError, match="colour"):
        DiffusionClassifier.from_pretrained(dit_dir, colour="red")
    with pytest.raises(DiveFastError, match="expected a cache of"):
        DiffusionClassifier.from_pretrained(dit_dir, cache="some")


def test_the_last_run_is_kept():
    clf = classifier(cache="exact")
    clf(latents=latents(), strategy="enumerate", probes=8)
    assert (clf.last_run.rows, clf.last_run.batches) == (3 * 8 * 5, 5)
    assert clf.last_run.evaluations == 120 and clf.last_run.fill_rate == 1.0
    assert clf.last_run.cache_bytes > 0 and clf.last_run.cache_misses == 3 * 8 + 5
    clf.losses(latents=latents(1), probes=1)
    assert (clf.last_run.rows, clf.last_run.capacity_rows) == (5, 24)


def test_the_command_line(dit_dir, folder, capsys):
    images = sorted(folder.rglob("*.png"))
    arguments = ("classify", *images, "--model", dit_dir, "--probes", 12, "--top", 4)
    plain = call(capsys, *arguments)
    assert (plain.code, plain.err) == (0, "")
    for options in (
        ("--cache", "exact", "--cache-bytes", 4000),
        ("--cache", "off", "--channels-last"),
        ("--cache", "encoder", "--refresh", 1),
    ):
        assert call(capsys, *arguments, *options) == plain
    assert call(capsys, *arguments, "--autocast").code == 0
    assert_refused(call(capsys, *arguments, "--cache", "all"), "expected a cache of .*got 'all'")
    assert_refused(
        call(capsys, *arguments, "--refresh", "0"), "whole number of at least 1, got '0'"
    )


def test_a_run_goes_on_under_another_cache_but_not_another_precision(dit_dir, folder, tmp_path):
    def go(**options):
        clf = DiffusionClassifier.from_pretrained(dit_dir, **options)
        data = open_dataset(str(folder), clf.names)
        return evaluate(clf, data, tmp_path / "run", strategy="enumerate", probes=4)

    assert go(cache="exact").fill_rate == 4 * 4 * 4 / 256
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["environment"]["engine"]["cache"] == "exact" and "engine" not in run["config"]
    assert go(cache="off").fill_rate is None
    for other in ({"autocast": "bfloat16"}, {"cache": "encoder"}):
        with pytest.raises(RunError):
            go(**other)
