"""Tens of thousands of prompts: each is encoded once, with a bar, and not without the memory."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from PIL import Image

from dive_fast import ModelError
from dive_fast.core import memory
from dive_fast.models import load_model
from dive_fast.models.text import towers
from dive_fast.models.text.prompts import ClassPrompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def text(request) -> towers.PromptEncoder:
    directory = request.getfixturevalue(request.param)
    return load_model(directory, device="cpu", classes=["cat", "dog"]).text


class Counted:
    """Every prompt that a tokenizer is given, and how often it was called."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.prompts, self.calls = tokenizer, [], 0

    def __call__(self, prompts, **options):
        self.calls += 1
        self.prompts += prompts
        return self.tokenizer(prompts, **options)


@pytest.mark.parametrize("average", ["embedding", "loss"])
def test_a_prompt_that_classes_share_is_encoded_once(text, monkeypatch, average: str) -> None:
    counted = [Counted(tower.tokenizer) for tower in text.towers]
    counting = [t._replace(tokenizer=c) for t, c in zip(text.towers, counted, strict=True)]
    groups = {f"class {i}": [f"a {i % 7}", "a cat", f"the {i}"] for i in range(50)}
    classes = ClassPrompts.make(groups, average=average)
    with monkeypatch.context() as patch:
        patch.setattr(text, "towers", tuple(counting))
        table = text.table(classes, CPU)
    for tokenizer in counted:
        assert len(tokenizer.prompts) == len(set(tokenizer.prompts)) == 7 + 1 + 50
    for i in (0, 6, 31, 49):
        alone = text.encode(groups[f"class {i}"], CPU)
        expected = alone.mean(dim=0) if average == "embedding" else alone.flatten()
        torch.testing.assert_close(table[i], expected, rtol=1e-4, atol=1e-5)


def test_pooled_states_too(text, monkeypatch) -> None:
    counted = Counted(text.towers[0].tokenizer)
    prompts = ["cat", "dog", "cat", "a cat", "dog"] * 20
    with monkeypatch.context() as patch:
        patch.setattr(text, "towers", (text.towers[0]._replace(tokenizer=counted),))
        states = text.pooled_states(prompts, CPU)
    assert counted.prompts == ["cat", "dog", "a cat"]
    assert torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])
    alone = text.pooled_states(["a cat"], CPU)
    torch.testing.assert_close(states[3], alone[0], rtol=1e-4, atol=1e-5)


def test_the_check_reads_many_classes_at_once(text, monkeypatch) -> None:
    counted = Counted(text.towers[0].tokenizer)
    monkeypatch.setattr(text, "towers", (text.towers[0]._replace(tokenizer=counted),))
    names = [f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    text.check(ClassPrompts.make(names, ["{}", "a {}"]))
    assert counted.calls == 1 and len(counted.prompts) == 2 * len(names)
    monkeypatch.setattr(towers, "TOKEN_BATCH", 7)  # groups of prompts across batches
    with pytest.raises(ModelError, match="classes 'bc' and 'BC' have the same prompts"):
        text.check(ClassPrompts.make([*names, "BC"], ["{}", "a {}"]))


def test_a_table_beyond_the_memory_is_refused_first(sd, tmp_path, monkeypatch, capsys) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    arguments = ("classify", tmp_path / "a.png", "--model", sd, "--classes", "cat,dog,phone")
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * 16 * 12 * 4 - 1)
    said = call(capsys, *arguments)
    assert_refused(
        said, r"of 3 classes take 0.0 GB \(3 rows of 192 numbers\), and 0.0 GB of memory"
    )
    for enough in (3 * 16 * 12 * 4, None):
        monkeypatch.setattr(memory, "available_bytes", lambda enough=enough: enough)
        assert call(capsys, *arguments).code == 0


def test_the_memory_that_is_available(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   123 kB\n")
    (tmp_path / "limit").write_text("1000\n")
    monkeypatch.setattr(memory, "_FREE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_LIMIT", tmp_path / "limit")
    assert memory.available_bytes() == 1000
    (tmp_path / "limit").write_text("max\n")
    assert memory.available_bytes() == 123 * 1024
    monkeypatch.setattr(memory, "_FREE", tmp_path / "none")
    monkeypatch.setattr(memory, "_LIMIT", tmp_path / "none")
    assert memory.available_bytes() is None


def test_the_bar_is_for_terminals(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with towers.encoding_bar(5) as bar:
            assert bar.disable != shown
