"""The Triton kernels without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    folders = (ROOT, ROOT / "tests", ROOT / "tests" / "ops")
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders),
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@needs_triton
def test_the_interpreted_kernels_are_right():
    """In a process of its own, for the variable is read when a kernel is defined."""
    file = str(Path(__file__).with_name("triton_interpreted.py"))
    result = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", file], TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "7 passed" in result.stdout, result.stdout


@needs_triton
@pytest.mark.parametrize("architecture", (80, 90))
def test_every_kernel_compiles_ahead_of_time(architecture, tmp_path):
    from triton_compile import compile_all

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    sizes = compile_all(architecture, tmp_path)
    assert len(sizes) == 28
    for name, (size, stable) in sizes.items():
        assert size > 0, name
        # The assertion of an index out of range must not be optimised away.
        assert stable, f"{name} holds no assertion"


def test_works_without_triton():
    """Nothing imports triton before a kernel is launched, and without it the references remain."""
    script = (
        "import sys, importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
        "import torch, dive_fast.ops as ops\n"
        "sys.modules['triton'] = None\n"
        "x0, row, one = torch.full((1, 1, 2, 2), 3.0), torch.tensor([0]), torch.ones(1)\n"
        "assert ops.q_sample(x0, row, x0, row, one, one).mean() == 6\n"
        "key = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(key('dive_fast::q_sample', 'CUDA'))\n"
    )
    result = run(["-c", script])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


@needs_triton
def test_triton_serves_cuda_and_is_not_imported_for_it():
    script = (
        "import sys, torch, dive_fast.ops\n"
        "key = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "names = ('q_sample', 'noise_prediction_loss', 'noise_prediction_loss_backward')\n"
        "print(*(key(f'dive_fast::{name}', 'CUDA') for name in names))\n"
        "print(any(name.startswith('dive_fast.kernels') for name in sys.modules))\n"
    )
    result = run(["-c", script])
    assert result.stdout.split() == ["True", "True", "True", "False"], result.stderr
