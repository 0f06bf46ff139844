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
    # Benchmarks are switched off in a process that pytest-xdist has started.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**environment, "PYTHONPATH": str(ROOT)},
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


def test_the_loop_with_accelerate(monkeypatch):
    from bench import accelerate_loop

    size = accelerate_loop.Size((16, 32, 32, 32), 24, 8, 2, 3, 2, 1, accelerate_loop.torch.float32)
    monkeypatch.setattr(
        accelerate_loop,
        "make_unet",
        lambda size: accelerate_loop.UNet2DConditionModel(
            block_out_channels=size.channels,
            cross_attention_dim=size.text_width,
            attention_head_dim=8,
            norm_num_groups=8,
            layers_per_block=1,
        ),
    )
    shares = accelerate_loop.work(size)
    assert 0 < shares["kv_share"] < shares["saved_share"] < 1 < shares["expected_ratio"]
    result = accelerate_loop.measure(size, repeats=1)
    assert result["ratio"] > 0
    seen = result["statistics"]
    # Two images of three timesteps under two prompts, prompt by prompt.
    assert (seen["prefix_misses"], seen["prefix_hits"], seen["prefix_shared"]) == (6, 6, 0)
    assert (seen["condition_misses"], seen["rows"], seen["plain_calls"]) == (2, 12, 0)
