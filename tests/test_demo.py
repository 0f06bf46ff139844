"""The demo on digits, with fewer probes and without the published loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dive_fast.cli import demo_digits

pytest.importorskip("matplotlib", reason="the image comes with the extra demo")


def test_the_picture_comes_first(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo_digits, "ROWS", demo_digits.ROWS[:3])
    monkeypatch.setattr(demo_digits, "PROBES", 10)
    summary = demo_digits.run_demo(tmp_path, limit=3)
    assert capsys.readouterr().out.splitlines() == [
        "auto: 3 digits",
        f"{tmp_path}/digits.png is there, for now of auto alone",
        "enumerate: 3 digits",
        "invert: 3 digits",
    ]
    assert (tmp_path / "digits.png").stat().st_size > 1000
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert list(summary["strategies"]) == ["auto", "enumerate", "invert"]
    assert summary["strategies"]["enumerate"]["evaluations_per_image"] == 100
    for figures in summary["strategies"].values():
        assert figures["n"] == 3 and 0 <= figures["agreement_with_enumeration"] <= 1
    assert len(demo_digits.as_table(summary).splitlines()) == 5


def test_agreement_counts_what_both_saw() -> None:
    """Of three digits that one strategy saw the other saw two, and agrees on one."""

    def record(index: int) -> dict:
        return {"index": index, "truth": 1, "probability": 0.9, "evaluations": 1, "seconds": 1}

    auto, enumerate_row = demo_digits.ROWS[:2]
    records = {
        "auto": {"a": record(1), "b": record(1), "c": record(2)},
        "enumerate": {"a": record(1), "b": record(3)},
    }
    found = demo_digits._figures(records, auto)
    assert found["n"] == 3 and found["agreement_with_enumeration"] == 0.5
    assert demo_digits._figures(records, enumerate_row)["agreement_with_enumeration"] == 1
