"""What the bench of generators says of ranks."""

from __future__ import annotations

import pytest

from bench.generators import OF_SAMPLES, _correlations


def checkpoint(accuracy: float, rank: float, recall: float) -> dict:
    figures = dict.fromkeys(OF_SAMPLES, accuracy) | {"recall": recall}
    score = {"accuracy": {"value": accuracy}, "rank": {"value": rank}}
    return {"score": score, "samples": {"pixels": figures}}


def test_rank_correlations_by_hand() -> None:
    """Spearman's 1 - 6 sum d^2 / (n (n^2 - 1)); a low mean rank is a high score."""
    found = _correlations(
        [checkpoint(0.1, 4.0, 0.3), checkpoint(0.2, 3.5, 0.1), checkpoint(0.7, 1.0, 0.2)]
    )
    assert found["accuracy"]["pixels"]["precision"] == 1
    assert found["rank"]["pixels"]["precision"] == 1
    assert found["rank"]["pixels"]["recall"] == pytest.approx(1 - 6 * (4 + 1 + 1) / 24)
