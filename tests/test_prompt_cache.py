"""Encoded prompts are kept on the disk, under all that they depend on, and nothing else is."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from flow_families import edit
from safetensors.torch import load_file, save_file
from tiny_aura import write_aura

from dive_fast.models import load_model
from dive_fast.models.text import prompt_cache
from dive_fast.models.text.pipeline_text import PipelineText
from dive_fast.models.text.prompt_cache import PromptCache, cache_directory

CLASSES = ["cat", "big dog"]


@pytest.fixture(scope="module")
def aura(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_aura(tmp_path_factory.mktemp("aura") / "model")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The prompts that text encoders have run for."""
    asked, plain = [], PipelineText._encode

    def noted(self, prompts, device, encode):
        asked.extend(prompts)
        return plain(self, prompts, device, encode)

    monkeypatch.setattr(PipelineText, "_encode", noted)
    return asked


def table(directory: Path, classes: list[str] = CLASSES, **asked: object) -> torch.Tensor:
    return load_model(directory, classes=classes, device="cpu", **asked).vocabulary.table


def test_a_prompt_is_encoded_once(aura: Path, cache: Path, encoded: list[str]) -> None:
    first = table(aura)
    assert sorted(encoded) == ["", "a photo of a big dog.", "a photo of a cat."]
    assert len(list(cache.iterdir())) == 3
    encoded.clear()
    assert torch.equal(table(aura), first) and encoded == []
    third = table(aura, ["cat", "bird", "big dog"])
    assert encoded == ["a photo of a bird."]
    assert torch.equal(third[[0, 2]], first)


def test_it_is_that_of_a_run_without(aura: Path, cache: Path, monkeypatch) -> None:
    kept = (table(aura), table(aura))[1]
    monkeypatch.setenv("DIVE_FAST_CACHE", "")
    torch.testing.assert_close(kept, table(aura), rtol=1e-5, atol=1e-6)


def test_what_it_depends_on(aura, cache, encoded, tmp_path, monkeypatch) -> None:
    table(aura)

    def check_new(directory: Path, **asked: object) -> None:
        encoded.clear()
        found = table(directory, **asked)
        assert sorted(encoded) == ["", "a photo of a big dog.", "a photo of a cat."]
        encoded.clear()
        assert torch.equal(table(directory, **asked), found) and not encoded

    moved = tmp_path / "moved"
    shutil.copytree(aura, moved)
    encoded.clear()
    table(moved)
    assert not encoded  # not on where the model lies
    weights = moved / "text_encoder" / "model.safetensors"
    values = load_file(weights)
    values["encoder.final_layer_norm.weight"][3] *= 2
    save_file(values, weights)
    check_new(moved)
    edit(moved / "text_encoder" / "config.json", layer_norm_epsilon=1e-3)
    check_new(moved)
    edit(moved / "tokenizer" / "tokenizer_config.json", model_max_length=9)
    check_new(moved)
    check_new(aura, dtype="bfloat16")
    monkeypatch.setattr(prompt_cache, "REVISION", prompt_cache.REVISION + 1)
    check_new(aura)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other(path: Path) -> None:
    save_file({"sequence": torch.zeros(2, 2)}, path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, flip, empty, other, folder])
def test_damaged_entries_are_made_anew(aura, cache, encoded, damage) -> None:
    expected = table(aura)
    for path in sorted(cache.iterdir()):
        damage(path)
    encoded.clear()
    torch.testing.assert_close(table(aura), expected, rtol=1e-5, atol=1e-6)
    assert len(encoded) >= 3
    if damage is not folder:
        encoded.clear()
        assert torch.equal(table(aura), expected) and not encoded


def test_a_folder_that_cannot_be_written_is_told_once(aura, tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert table(aura).isfinite().all()
    said = [record.getMessage() for record in caplog.records if "kept" in record.getMessage()]
    assert len(said) == 1 and said[0].endswith("Not a directory.")


def test_where_it_lies(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DIVE_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "dive_fast" / "prompts"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "dive_fast" / "prompts"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == tmp_path / ".cache" / "dive_fast" / "prompts"
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own" / "prompts"
    monkeypatch.setenv("DIVE_FAST_CACHE", "")
    assert cache_directory() is None


def test_off_by_an_empty_variable(aura, cache, encoded, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DIVE_FAST_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    table(aura), table(aura)
    assert encoded.count("a photo of a cat.") == 2
    assert not cache.exists() and not (tmp_path / "home").exists()


def test_entries_of_every_precision(tmp_path: Path) -> None:
    cache = PromptCache({"x": 1}, tmp_path)
    parts = {
        "sequence": torch.randn(5, 3).to(torch.bfloat16).T,  # not contiguous
        "mask": torch.tensor([1, 0]),
        "scale": torch.tensor(2.5),
    }
    assert cache.read("way", "a") is None
    cache.write(parts, "way", "a")
    found = cache.read("way", "a")
    assert found.keys() == parts.keys()
    for name, part in parts.items():
        assert found[name].dtype == part.dtype and torch.equal(found[name], part)
    assert cache.read("another way", "a") is None and cache.read("way", "A") is None
    assert PromptCache({"x": 2}, tmp_path).read("way", "a") is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
