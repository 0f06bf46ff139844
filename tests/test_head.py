"""A head on features: what it computes, its file, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dive_fast import DiveFastError, ModelError
from dive_fast.core.head import Head, in_cells, recall_at
from dive_fast.core.shortlist import digest
from dive_fast.core.vocabulary import Vocabulary

NAMES = ("a", "b", "c")


def make_head(kind: str = "linear", **changes) -> Head:
    """Three classes, two features; the standardised features are (f - 1) / 2."""
    values = {
        "layer": "blocks.1",
        "timestep": 7,
        "grid": None if kind == "attention" else 1,
        "kind": kind,
        "weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]),
        "bias": torch.tensor([0.0, 0.5, 0.0]),
        "mean": torch.tensor([1.0, 1.0]),
        "scale": torch.tensor([2.0, 2.0]),
        "classes": digest(NAMES),
        "recall": (0.5, 0.75, 1.0),
        "query": torch.tensor([math.sqrt(2.0), 0.0]) if kind == "attention" else None,
    }
    return Head(**{**values, **changes})


def test_scores_of_a_linear_head_are_log_probabilities() -> None:
    scores = make_head().scores(torch.tensor([[[5.0, 1.0]]]))  # z = (2, 0); logits 2, 0.5, -2
    total = math.log(math.exp(2) + math.exp(0.5) + math.exp(-2))
    expected = torch.tensor([[[2 - total, 0.5 - total, -2 - total]]])
    torch.testing.assert_close(scores, expected)


def test_scores_of_a_head_of_losses_are_the_negated_losses() -> None:
    scores = make_head("losses").scores(torch.tensor([5.0, 1.0]))
    torch.testing.assert_close(scores, torch.tensor([-2.0, -0.5, 2.0]))


def test_attention_pools_the_tokens_by_its_query() -> None:
    tokens = torch.tensor([[5.0, 1.0], [1.0, 3.0]])  # z = (2, 0) and (0, 1)
    a = math.exp(2) / (math.exp(2) + 1)
    logits = torch.tensor([2 * a, (1 - a) + 0.5, -2 * a - (1 - a)])
    found = make_head("attention").scores(tokens[None])
    torch.testing.assert_close(found, logits.log_softmax(dim=0)[None])


@pytest.mark.parametrize("kind", ["linear", "losses", "attention"])
def test_the_file_gives_back_the_head(tmp_path: Path, kind: str) -> None:
    head, path = make_head(kind), tmp_path / "head.safetensors"
    head.save(path)
    again = Head.load(path)
    features = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.scores(features), head.scores(features), rtol=0, atol=0)
    names = ("layer", "timestep", "grid", "kind", "classes", "recall")
    assert [getattr(again, n) for n in names] == [getattr(head, n) for n in names]
    assert again.digest() == head.digest()


def test_the_digest_tells_heads_apart() -> None:
    head = make_head()
    others = [replace(head, timestep=8), replace(head, bias=head.bias + 1), make_head("losses")]
    assert len({other.digest() for other in [head, *others]}) == 4


def test_it_fits_its_classes_only() -> None:
    head = make_head()
    assert head.fits(Vocabulary(torch.zeros(3, 4), NAMES))
    assert not head.fits(Vocabulary(torch.zeros(3, 4), ("a", "c", "b")))
    assert not head.fits(Vocabulary(torch.zeros(2, 4), NAMES[:2]))


def test_activations_are_averaged_over_cells() -> None:
    rows = torch.arange(16.0).reshape(4, 4)  # of an image of 4 x 4 positions
    maps = torch.stack([rows, 10 * rows])[None]  # D = 2
    tokens = maps.flatten(2).mT
    cells = torch.tensor([2.5, 4.5, 10.5, 12.5])  # means of 2 x 2, row by row
    expected = torch.stack([cells, 10 * cells], dim=1).flatten()[None]
    for found in (maps, tokens):
        torch.testing.assert_close(in_cells(found, 2), expected)
        torch.testing.assert_close(in_cells(found, None), tokens)
    torch.testing.assert_close(in_cells(tokens, 1), torch.tensor([[7.5, 75.0]]))
    pooled = torch.randn(3, 2)
    assert in_cells(pooled, 1) is pooled
    with pytest.raises(DiveFastError, match="tokens of a square image, got 6"):
        in_cells(torch.zeros(1, 6, 2), 2)
    with pytest.raises(DiveFastError, match=r"expected activations .* got \[3, 2\]"):
        in_cells(pooled, 2)


@pytest.mark.parametrize(
    ("kind", "grid", "pool"), [("linear", 1, "mean"), ("attention", None, None)]
)
def test_it_reads_what_its_request_gives(kind: str, grid: int | None, pool: str | None) -> None:
    head = make_head(kind, grid=grid)
    assert head.pool == pool
    tokens = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    given = tokens.mean(dim=1) if pool else tokens
    torch.testing.assert_close(head.read(given), head.scores(given))


def test_a_head_of_cells_reads_tokens() -> None:
    weight = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]])
    zeros, ones = torch.zeros(4), torch.ones(4)
    head = make_head("losses", grid=2, weight=weight, bias=torch.zeros(3), mean=zeros, scale=ones)
    assert head.pool is None
    tokens = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]  # 2 x 2 positions, D = 1
    torch.testing.assert_close(head.read(tokens), torch.tensor([[-1.0, -2.0, -4.0]]))


def test_recall_counts_the_ranks() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.0, 5.0, 1.0]])
    answers = torch.tensor([0, 0, 1, 2])  # ranks 0, 2, 1 (a tie), 1
    assert recall_at(scores, answers) == (0.25, 0.75, 1.0)
    many = torch.arange(100.0)[None]
    assert len(recall_at(many, torch.tensor([99]))) == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cubic"}, "one of linear, losses, attention, got 'cubic'"),
        ({"layer": 3}, "layer must be a text"),
        ({"layer": ""}, "layer must be a text"),
        ({"classes": None}, "classes must be a text"),
        ({"grid": None}, "grid must be a whole number of at least 1, got None"),
        ({"grid": 0}, "grid must be at least 1, got 0"),
        ({"timestep": -1}, "timestep must be at least 0"),
        ({"timestep": 1.5}, "timestep must be a whole number"),
        ({"weight": torch.zeros(3)}, r"weight must be a tensor \[C, D\], got \[3\]"),
        ({"weight": [[1.0]]}, r"weight must be a tensor \[C, D\]"),
        ({"bias": torch.zeros(2)}, r"bias must be a tensor \[3\], got \[2\]"),
        ({"mean": None}, r"mean must be a tensor \[2\], got None"),
        ({"scale": torch.tensor([1.0, 0.0])}, "scale must be above 0, got 0"),
        ({"bias": torch.tensor([0.0, torch.nan, 0.0])}, "bias must be finite"),
        ({"query": torch.zeros(2)}, "has no query"),
        ({"recall": (0.5, 0.4)}, "recall must hold"),
        ({"recall": (0.5, 1.5)}, "recall must hold"),
        ({"recall": 1.0}, "recall must hold"),
        ({"recall": (1.0,) * 65}, "recall must hold at most 64"),
    ],
)
def test_what_a_head_is_not(changes: dict, message: str) -> None:
    with pytest.raises(DiveFastError, match=message):
        make_head(**changes)


def test_attention_needs_a_query_and_no_grid() -> None:
    with pytest.raises(DiveFastError, match="attention has no grid, got 1"):
        make_head("attention", grid=1)
    with pytest.raises(DiveFastError, match=r"query must be a tensor \[2\], got None"):
        make_head("attention", query=None)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(DiveFastError, match=r"D = 2, got \[4, 3\]"):
        make_head().scores(torch.zeros(4, 3))
    with pytest.raises(DiveFastError, match=r"\[..., tokens, D\] with D = 2, got \[2\]"):
        make_head("attention").scores(torch.zeros(2))


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    make_head().save(path)
    whole = path.read_bytes()
    for content in (b"", b"x", whole[:10], whole[:-5], whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="damaged file or something else"):
            Head.load(path)


def with_metadata(path: Path, changes: dict) -> None:
    """Writes a head whose metadata say something else."""
    make_head().save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = {**file.metadata(), **changes}
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pt"}, "expected a head that 'dive-fast probe' wrote"),
        ({"head": "{"}, "damaged"),
        ({"head": "[]"}, "must say exactly"),
        ({"head": json.dumps({"layer": "a"})}, "must say exactly"),
    ],
)
def test_other_metadata_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with_metadata(tmp_path / "head.safetensors", changes)
    with pytest.raises(ModelError, match=rf"head.safetensors: not a head \(.*{message}"):
        Head.load(tmp_path / "head.safetensors")


def test_files_that_are_not_there_and_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is none"):
        Head.load(tmp_path / "none")
    with pytest.raises(ModelError, match="there is none"):
        Head.load(tmp_path)
    with pytest.raises(ModelError, match="expected the path of a head, got 3"):
        Head.load(3)
    with pytest.raises(ModelError, match="cannot be written"):
        make_head().save(tmp_path / "none" / "head")


def test_missing_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    make_head().save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    save_file({**tensors, "other": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(ModelError, match="no tensors but"):
        Head.load(path)
    del tensors["bias"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ModelError, match=r"bias must be a tensor \[3\], got None"):
        Head.load(path)
