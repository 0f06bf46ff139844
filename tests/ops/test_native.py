"""The compiled library: which ops it serves, and that every instruction set gives the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dive_fast import ops

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "nearest_box",
    "nearest_row",
    "noise_prediction_error_map",
    "noise_prediction_loss",
    "noise_prediction_loss_backward",
    "q_sample",
)


def test_status_names_every_op_and_says_why():
    status = ops.native_status()
    assert tuple(sorted(status)) == NAMES
    for name, entry in status.items():
        served = torch._C._dispatch_has_kernel_for_dispatch_key(f"dive_fast::{name}", "CPU")
        assert entry.native == served
        assert entry.reason.startswith("CPU: " if served else ("library not built", "built for"))


@pytest.mark.skipif(
    not ops.native_status()["q_sample"].native, reason=ops.native_status()["q_sample"].reason
)
@pytest.mark.parametrize("instruction_set", ("plain", "avx2"))
def test_accuracy_holds_for_older_processors(instruction_set):
    environment = {
        **os.environ,
        "DIVE_FAST_CPU": instruction_set,
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests")),
    }
    script = (
        "import sys, pytest, dive_fast.ops as ops\n"
        "print('set:', ops.native_status()['q_sample'].reason)\n"
        "options = ['-q', '-p', 'no:cacheprovider', '-k', 'accuracy or narrow']\n"
        "sys.exit(pytest.main([*options, *sys.argv[1:]]))\n"
    )
    files = [
        str(ROOT / "tests" / "ops" / f"test_{name}.py")
        for name in ("q_sample", "noise_prediction_loss", "nearest_row")
    ]
    result = subprocess.run(
        [sys.executable, "-c", script, *files],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    used = result.stdout.splitlines()[0].removeprefix("set: CPU: ")
    assert used == instruction_set or (used, instruction_set) == ("plain", "avx2")
