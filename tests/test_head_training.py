"""How a head is learned, what is held out, and what is kept of it on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dive_fast import DiveFastError, RunError
from dive_fast.core.head import Head
from dive_fast.predict.chunks import CHUNK, Chunks
from dive_fast.predict.head_choice import Learner, split, subset
from dive_fast.predict.head_training import (
    train_attention,
    train_linear,
    train_losses,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_linear_head_parts_what_can_be_parted() -> None:
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels] * 5 + 100 + torch.randn(60, 3, generator=generator())
    found = train_linear(features, labels, 4, 0.1)
    out = ((features - found.mean) / found.scale) @ found.weight.T + found.bias
    assert (out.argmax(dim=1) == labels).double().mean() > 0.95
    # A class without an image is last of all.
    assert bool((out.argmin(dim=1) == 3).all())


def test_two_classes_get_the_odds_of_a_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    features = torch.randn(50, 2, generator=generator()).double()
    labels = (features[:, 0] + 0.5 * torch.randn(50, generator=generator(1)) > 0).long()
    found = train_linear(features.float(), labels, 2, 0.1)
    z = (features - features.mean(dim=0)) / features.std(dim=0, correction=0)
    model = LogisticRegression(C=0.1).fit(z.numpy(), labels.numpy())
    expected = torch.from_numpy(model.predict_log_proba(z.numpy()))
    got = (z.float() @ found.weight.T + found.bias).log_softmax(dim=1)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0.02)


def test_a_ridge_recovers_centred_losses_of_any_unit() -> None:
    features = torch.randn(80, 5, generator=generator())
    losses = 1e-4 * (features @ torch.randn(5, 3, generator=generator(1)))
    given = losses + torch.randn(80, 1, generator=generator(2))  # the image's own level
    found = train_losses(features, given)
    out = ((features - found.mean) / found.scale) @ found.weight.T + found.bias
    centred = losses - losses.mean(dim=1, keepdim=True)
    torch.testing.assert_close(out, centred, rtol=0, atol=1e-5)


def test_attention_finds_the_token_that_tells() -> None:
    labels = torch.arange(120) % 2
    tokens = torch.randn(120, 6, 4, generator=generator())
    place = torch.randint(6, (120,), generator=generator(1))
    tokens[torch.arange(120), place, 0] += 6  # which token speaks
    tokens[torch.arange(120), place, 1] = 3.0 * (2 * labels - 1)
    found = train_attention(tokens, labels, 2, seed=0)
    head = Head("a", 0, None, "attention", *found[:4], classes="x", query=found.query)
    assert (head.scores(tokens).argmax(dim=1) == labels).double().mean() > 0.95


def test_features_that_do_not_vary_do_no_harm() -> None:
    features = torch.randn(20, 3, generator=generator())
    features[:, 1] = 7.0
    labels = (features[:, 0] > 0).long()
    for found in (train_linear(features, labels, 2, 0.1), train_losses(features, features)):
        assert all(bool(tensor.isfinite().all()) for tensor in found[:4])
        assert found.scale[1] == 1


def test_a_linear_head_needs_two_classes() -> None:
    with pytest.raises(DiveFastError, match="2 classes or more, got one"):
        train_linear(torch.randn(5, 2), torch.ones(5, dtype=torch.int64), 3, 0.1)


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_every_image_is_in_one_part_and_every_class_in_both(share: float) -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    train, held = split(100, labels, share, seed=3)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(100))
    assert len(held) == round(100 * share)
    counts = labels[held].bincount(minlength=3)
    assert (counts - share * labels.bincount()).abs().max() <= 1
    again = split(100, labels, share, seed=3)
    assert torch.equal(again[0], train) and torch.equal(again[1], held)


def test_no_class_of_two_images_loses_both() -> None:
    labels = torch.arange(50).repeat_interleave(2)
    train, held = split(100, labels, 0.2, seed=0)
    assert len(held) == 20
    assert labels[train].unique().tolist() == list(range(50))


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (2, 0.1), (2, 0.9), (0, 0.2)])
def test_too_few_images_for_two_parts(count: int, share: float) -> None:
    with pytest.raises(DiveFastError, match=f"got {count} of which a share of {share:g}"):
        split(count, None, share, seed=0)


def test_a_subset_keeps_the_proportion() -> None:
    train, held = torch.arange(80), torch.arange(80, 100)
    assert [len(part) for part in subset(train, held, 10)] == [8, 2]
    assert [len(part) for part in subset(train, held, 100)] == [80, 20]


def test_a_choice_counts_the_ranks() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [0.0, 5.0, 1.0]])
    labels = torch.tensor([9, 0, 0, 2])  # the images' rows are 1 to 3: ranks 1, 3, 2
    rows = torch.tensor([1, 2, 3])
    expected = pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert Learner("linear", labels, 3, 0).score(scores, rows) == expected
    losses = torch.ones(4, 3).scatter(1, labels[:, None].clamp(max=2), 0.5)
    assert Learner("losses", losses, 3, 0).score(scores, rows) == expected


# -- chunks ---------------------------------------------------------------------------------------


def test_chunks_are_computed_once_and_damaged_ones_again(tmp_path: Path) -> None:
    asked = []

    def compute(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return torch.arange(start, stop, dtype=torch.float32)[:, None]

    chunks, n = Chunks(tmp_path / "a"), CHUNK + 3
    expected = torch.arange(n, dtype=torch.float32)[:, None]
    for _ in range(2):
        assert torch.equal(chunks.get("odd/name", n, compute), expected)
    assert asked == [(0, CHUNK), (CHUNK, n)]
    first, second = sorted((tmp_path / "a").iterdir())
    first.write_bytes(first.read_bytes()[:50])
    np.save(second, np.zeros((2, 1), np.float32))
    assert torch.equal(chunks.get("odd/name", n, compute), expected)
    assert len(asked) == 4
    Chunks().get("odd/name", n, compute)
    assert len(asked) == 6
    assert torch.equal(chunks.get("small", 5, compute, 2), expected[:5])
    assert asked[6:] == [(0, 2), (2, 4), (4, 5)]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Chunks(tmp_path / "file").get("a", 1, lambda start, stop: torch.zeros(1))


# -- fit_head -------------------------------------------------------------------------------------
