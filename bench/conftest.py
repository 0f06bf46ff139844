"""Options of the benchmarks, and the one writer of bench/results/*.json."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import dive_fast
from dive_fast import ops

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=0, help="threads of torch (default: its own)")
    parser.addoption("--record", action="store_true", help="write bench/results/<time>.json")


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """No number without a green gate: a failed run leaves no record."""
    if exitstatus != 0 or not session.config.getoption("--record"):
        return
    rows = [row(benchmark) for benchmark in session.config._benchmarksession.benchmarks]
    if not rows:
        return
    now = datetime.datetime.now(datetime.timezone.utc)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y%m%dT%H%M%SZ}.json"
    record = {"time": now.isoformat(timespec="seconds"), **provenance(), "rows": rows}
    with path.open("x", encoding="utf-8") as file:  # "x": append-only, nothing is overwritten
        json.dump(record, file, indent=1)
        file.write("\n")


def row(benchmark) -> dict[str, object]:
    """Seconds, and what follows from them."""
    info, stats = dict(benchmark.extra_info), benchmark.stats
    bandwidth = info.pop("copy_bandwidth")
    share = info["bytes"] / stats.median / bandwidth if bandwidth else None
    return {
        **info,
        "median": stats.median,
        "iqr": stats.iqr,
        "min": stats.min,
        "rounds": stats.rounds,
        "copy_bandwidth": bandwidth,
        "share_of_copy": share,
    }


def provenance() -> dict[str, object]:
    """Where the numbers come from."""
    return {
        "commit": commit(),
        "machine": machine(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dive_fast": dive_fast.__version__,
        "kernels": {name: status.reason for name, status in ops.native_status().items()},
    }


def commit() -> str:
    """The commit, with "+changes" if the tree has any; "unknown" outside a repository."""
    folder = Path(__file__).parent
    try:
        name, changes = (
            subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+changes" if changes else "")


def machine() -> dict[str, object]:
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if "model name" in line).partition(":")[2].strip()
    except (OSError, StopIteration):
        pass
    result: dict[str, object] = {"processor": processor, "cores": os.cpu_count()}
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result
