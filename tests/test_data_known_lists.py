"""Lists of classes and templates that other packages keep."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from dive_fast.cli.loading import class_names, templates
from dive_fast.data.known_lists import known_classes, known_templates
from dive_fast.errors import DataError
from dive_fast.models.text.prompts import ClassPrompts

needs_open_clip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed"
)


@pytest.fixture
def benchmark_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of clip_benchmark's form: its files, and code that must not run."""
    folder = tmp_path / "clip_benchmark" / "datasets"
    folder.mkdir(parents=True)
    for init in (folder / "__init__.py", folder.parent / "__init__.py"):
        init.write_text("raise ImportError('it needs torchvision')")
    (folder / "en_classnames.json").write_text(json.dumps({"pets": ["Abyssinian", "Beagle"]}))
    (folder / "en_zeroshot_classification_templates.json").write_text(
        json.dumps({"pets": ["a photo of a {c}, a type of pet."], "cifar10": ["a {c}.", "{c}!"]})
    )
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@needs_open_clip
class TestOpenClip:
    def test_classes_of_imagenet(self) -> None:
        names = class_names("open_clip:imagenet")
        assert len(names) == 1000
        assert names[:3] == ["tench", "goldfish", "great white shark"]
        assert names[999] == "toilet paper"
        assert "open_clip" not in sys.modules

    @pytest.mark.parametrize(
        "name, count, first",
        [("openai", 80, "a bad photo of a {}."), ("simple", 7, "itap of a {}.")],
    )
    def test_templates(self, name: str, count: int, first: str) -> None:
        found = known_templates(f"open_clip:{name}")
        assert len(found) == len(set(found)) == count and found[0] == first
        assert all(text.count("{}") == 1 for text in found)

    def test_prompts(self) -> None:
        given = templates(["open_clip:simple", "my {}"])
        made = ClassPrompts.make(class_names("open_clip:imagenet"), given)
        assert len(made.prompts[0]) == 8
        assert made.prompts[1][0] == "itap of a goldfish." and made.prompts[1][7] == "my goldfish"

    def test_unknown(self) -> None:
        with pytest.raises(DataError, match="open_clip:food: expected one of .* lists imagenet"):
            known_classes("open_clip:food")
        with pytest.raises(DataError, match="lists openai, simple"):
            known_templates("open_clip:imagenet")


class TestClipBenchmark:
    def test_lists(self, benchmark_lists: Path) -> None:
        assert class_names("clip_benchmark:pets") == ["Abyssinian", "Beagle"]
        assert templates(["clip_benchmark:pets"]) == ["a photo of a {}, a type of pet."]
        assert known_templates("clip_benchmark:cifar10") == ["a {}.", "{}!"]
        assert "clip_benchmark" not in sys.modules

    def test_unknown(self, benchmark_lists: Path) -> None:
        with pytest.raises(DataError, match="expected one of clip_benchmark's lists pets"):
            known_classes("clip_benchmark:cifar10")

    def test_damaged(self, benchmark_lists: Path) -> None:
        (benchmark_lists / "en_classnames.json").write_text("{")
        with pytest.raises(
            DataError, match="clip_benchmark:pets: .*en_classnames.json cannot be read"
        ):
            known_classes("clip_benchmark:pets")
        (benchmark_lists / "en_classnames.json").unlink()
        with pytest.raises(
            DataError, match="has no datasets/en_classnames.json in the version here"
        ):
            known_classes("clip_benchmark:pets")

    def test_a_template_without_a_place(self, benchmark_lists: Path) -> None:
        path = benchmark_lists / "en_zeroshot_classification_templates.json"
        path.write_text(json.dumps({"pets": ["a pet"]}))
        with pytest.raises(DataError, match="a place for the class, got 'a pet'"):
            known_templates("clip_benchmark:pets")


@pytest.mark.parametrize(
    "text, advice",
    [("open_clip:imagenet", r"dive_fast\[clip\]"), ("clip_benchmark:pets", "--no-deps clip-bench")],
)
def test_not_installed(monkeypatch: pytest.MonkeyPatch, text: str, advice: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"{text}: .* is not installed: pip install .*{advice}"):
        known_classes(text)


def test_names_and_files_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("open_clip:imagenet").write_text("cat\ndog\n")
    assert class_names("open_clip:imagenet") == ["cat", "dog"]
    assert class_names("open_clip, other:x") == ["open_clip", "other:x"]
    assert templates(None) is None and templates(["a {}"]) == ["a {}"]
