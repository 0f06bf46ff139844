"""The benches of ``auto`` run through on the embedded model, and say what they measured."""

from __future__ import annotations

import json

import pytest
import torch

import bench.records
from bench import auto_ablation, auto_agreement
from dive_fast import DiffusionClassifier
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.data.digits import load_digits
from dive_fast.predict.checking import Measured


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.records, "RESULTS", tmp_path)

    def read(name):
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    return read


def test_agreement_is_with_enumeration_and_the_reference_is_kept(results, tmp_path):
    reference = tmp_path / "ref.pt"
    arguments = ["--limit", "3", "--probes", "12", "--levels", "0.9", "--budgets", "20"]
    auto_agreement.main([*arguments, "--reference", str(reference), "--strategies", "race"])
    rows = results("auto_agreement")
    assert [row["variant"] for row in rows] == ["fitted"] * 3 + ["timesteps only"] * 2 + [
        "unfitted"
    ] * 2
    assert all(row["images"] == 3 and 0 <= row["agreement"] <= 1 for row in rows)
    assert all(row["evaluations"] <= 20 for row in rows if "budget" in row)
    means = torch.load(reference)["mean"]
    assert means.shape == (3, 10) and bool(means.isfinite().all())


def test_the_reference_is_enumerations(tmp_path):
    classifier = DiffusionClassifier.from_pretrained("digits")
    x0 = classifier.encode(load_digits("test").images[:2])
    probes = low_discrepancy_probes(6, 1000, classifier.model.latent_shape)
    found = auto_agreement.reference(classifier, x0, probes, None)
    expected = classifier.losses(latents=x0, probes=probes).mean(dim=2)
    torch.testing.assert_close(found, expected)


def test_ablation_has_a_row_for_every_part(results):
    auto_ablation.main(["--limit", "3"])
    rows = results("auto_ablation")
    apart = {"differences, pairs", "differences, single"}
    assert {row["part"] for row in rows} == {*auto_ablation.PARTS, "without pairs", *apart}
    assert len(rows) == 2 * (len(auto_ablation.PARTS) + 1) + 2


def test_differences_by_hand():
    """One image, three classes: class 1 is best, class 2 next; the gradient says it exactly."""
    losses = torch.stack([torch.full((16,), 9.0), torch.zeros(16), torch.arange(16.0)])
    slopes = torch.stack([torch.zeros(2), torch.zeros(2), torch.tensor([0.5, 2.5])])
    found = auto_ablation.differences([Measured(losses, torch.zeros(4), slopes)])
    assert found["correlation"] == pytest.approx(1.0)
    # Blocks of 8 of class 2 have means 3.5 and 11.5; class 0 is 9 everywhere.
    assert found["variance"][8] == pytest.approx(32 / 2)
