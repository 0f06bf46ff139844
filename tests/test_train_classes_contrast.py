"""Rivals of the right class while a classifier is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from tiny_classes import TINY, train, weights, write_colours

from dive_fast import DiffusionClassifier
from dive_fast.errors import DiveFastError
from dive_fast.training.classes_learner import Learner
from dive_fast.training.classes_rivals import KAPPA, Contrast, with_rivals
from dive_fast.training.dit import build_transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("pictures"))


def learner(**changes: object) -> Learner:
    config = dataclasses.replace(
        TINY, sample_size=8, in_channels=3, num_classes=4, objective="flow", **changes
    )
    torch.manual_seed(0)
    x0, y = torch.randn(9, 3, 8, 8), torch.arange(9) % 4
    transformer = build_transformer(config)
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    names = ("a", "b", "c", "d")
    return Learner(transformer, lambda rows, g: x0[rows], y, x0, y, names, None, config)


def test_rivals_are_others() -> None:
    """No class twice in a row, each rival about as often as any; all where few are there."""
    y = torch.arange(5).repeat(400)
    asked = with_rivals(y, 5, 2, torch.Generator().manual_seed(0))
    assert torch.equal(asked[:, 0], y) and asked.shape == (2000, 3)
    assert all(len(set(row)) == 3 for row in asked.tolist())
    counts = torch.bincount(asked[y == 3, 1:].flatten(), minlength=5)
    assert counts[3] == 0 and (counts[[0, 1, 2, 4]] - 200).abs().max() < 50
    of_all = with_rivals(torch.tensor([0, 1]), 3, 7, torch.Generator().manual_seed(0))
    assert [set(row) for row in of_all.tolist()] == [{0, 1, 2}] * 2


def test_the_cross_entropy() -> None:
    """-log of exp(-kappa e) over the sum; of no pictures nothing, and still a gradient."""
    contrast = Contrast()
    errors = torch.tensor([[0.50, 0.51, 0.52], [0.60, 0.55, 0.58]])
    p = torch.exp(-KAPPA * (errors.double() - 0.5))
    expected = -(p[:, 0] / p.sum(dim=1)).log().mean().item()
    assert contrast(errors).item() == pytest.approx(expected, rel=1e-4)
    nothing = contrast(errors[:0])
    nothing.backward()
    assert nothing.item() == 0 and contrast.log_kappa.grad.item() == 0


def test_the_loss_with_rivals() -> None:
    """That of denoising and lambda times the cross-entropy, on the same noises."""
    # Draws of the rivals come last: those before are the same.
    plain = learner(contrast=0.0, label_dropout=1e-9)
    both = learner(contrast=0.5, rivals=3, label_dropout=1e-9)
    with torch.no_grad():
        denoising = plain.loss_of(0, torch.Generator().manual_seed(3))
        found = both.loss_of(0, torch.Generator().manual_seed(3))
    # All classes are asked, in another order at most: recompute by hand.
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(9, (TINY.batch_size,), generator=generator)
    torch.rand(len(rows), generator=generator)
    n = len(plain.convention.schedule)
    u = torch.randperm(len(rows), generator=generator) + torch.rand(1, generator=generator)
    t = (u / len(rows) * n).long().clamp(max=n - 1)
    eps = torch.randn(len(rows), 3, 8, 8, generator=generator)
    x0, y = plain.draw(rows, generator), plain.labels[rows]
    sigma = (t + 1).float()[:, None, None, None] / n
    with torch.no_grad():
        errors = []
        for c in range(4):
            v = plain.transformer((1 - sigma) * x0 + sigma * eps, t + 1.0, torch.full_like(y, c))
            errors.append((v.sample - (eps - x0)).square().flatten(1).mean(dim=1))
    e = torch.stack(errors, dim=1).double()
    own = e.gather(1, y[:, None])[:, 0]
    assert denoising.item() == pytest.approx(own.mean().item(), rel=1e-5)
    cross_entropy = (KAPPA * own + torch.logsumexp(-KAPPA * e, dim=1)).mean().item()
    assert found.item() == pytest.approx(own.mean().item() + 0.5 * cross_entropy, rel=1e-4)


def test_pictures_without_class_have_no_rivals() -> None:
    """Where all are shown without their class the loss is that of denoising."""
    plain = learner(contrast=0.0, label_dropout=1 - 1e-9)
    both = learner(contrast=0.5, label_dropout=1 - 1e-9)
    losses = [each.loss_of(0, torch.Generator().manual_seed(3)).item() for each in (plain, both)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_kappa_is_learned_and_not_kept(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "with", dataclasses.replace(TINY, contrast=0.5))
    train(folder, tmp_path / "without", dataclasses.replace(TINY, contrast=0.0))
    found, plain = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert found.keys() == plain.keys()
    assert not torch.equal(found["proj_out_2.weight"], plain["proj_out_2.weight"])
    state = torch.load(tmp_path / "with" / "training.pt", weights_only=True)["model"]
    assert state["1.log_kappa"].item() != torch.tensor(KAPPA).log().item()
    classifier = DiffusionClassifier.from_pretrained(tmp_path / "with")
    assert classifier.model.schedule.target == "sample"


def test_bad_input(folder: Path, tmp_path: Path, capsys) -> None:
    for changes, message in (
        ({"contrast": -0.1}, "expected a contrast of 0 or more, got -0.1"),
        ({"contrast": float("nan")}, "expected a contrast of 0 or more, got nan"),
        ({"rivals": 0}, "expected rivals of 1 or more, got 0"),
    ):
        with pytest.raises(DiveFastError, match=message):
            train(folder, tmp_path / "out", dataclasses.replace(TINY, **changes))
    where = ["--data", folder, "--out", tmp_path / "out"]
    for option, value in (("--contrast", "-1"), ("--rivals", "0"), ("--threads", "none")):
        said = call(capsys, "train-classes", *where, option, value)
        assert_refused(said, f"{option}: expected a (whole )?number")
