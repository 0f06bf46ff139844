"""The benchmark of an op runs, checks its result first, and its record can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import plot

ROOT = Path(__file__).resolve().parents[1]


def test_a_benchmark_runs_and_records(tmp_path):
    script = (
        "import sys, pathlib, pytest, bench.conftest as conftest\n"
        "conftest.RESULTS = pathlib.Path(sys.argv[1])\n"
        "options = ['-q', '-p', 'no:cacheprovider', '-k', '1-90 and not compile', '--record']\n"
        "options += ['--threads', '1', '--benchmark-max-time=0.01', '--benchmark-min-rounds=2']\n"
        "sys.exit(pytest.main([*options, 'bench/bench_nearest_box.py']))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert [row["backend"] for row in record["rows"]] == ["plain", "dive_fast"]
    assert all(row["median"] > 0 and row["threads"] == 1 for row in record["rows"])
    assert record["machine"]["cores"] >= 1 and record["torch"] and record["commit"]
    assert plot.table(record).count("nearest_box") == 2


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=str)
def test_recorded_results_can_be_read(path):
    record = json.loads(path.read_text())
    assert len(plot.table(record).splitlines()) == len(record["rows"]) + 4


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"op": "x", "size": "1", "backend": name, "median": 1e-3, "iqr": 1e-4}
        for name in ("plain", "dive_fast")
    ]
    plot.draw({"rows": rows}, tmp_path / "figures")
    assert (tmp_path / "figures" / "x.png").stat().st_size > 1000
