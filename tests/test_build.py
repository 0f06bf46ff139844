"""The package installs with and without a compiler, and says which."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import json, torch, dive_fast.kernels, dive_fast.ops as ops
x0, row, one = torch.full((1, 1, 2, 2), 3.0), torch.tensor([0]), torch.ones(1)
x_t = ops.q_sample(x0, row, x0, row, one, one)
status = ops.native_status()["q_sample"]
print(json.dumps([ops.__file__, x_t.mean().item(), status.native, status.reason]))
"""


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of what the build reads: a test cannot disturb this tree, nor be helped by it."""
    copy = tmp_path / "sources"
    ignored = shutil.ignore_patterns("*.so", "_build_record.json", "__pycache__")
    for folder in ("csrc", "dive_fast", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("CMakeLists.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy / name)
    return copy


def install(sources: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "--disable-pip-version-check", "--target", str(target), str(sources)]
    return subprocess.run(
        command, env={**clean_environment(), **environment}, capture_output=True, text=True
    )


def clean_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DIVE_FAST_") and name != "PYTHONPATH"
    }


def probe(target: Path) -> tuple[float, bool, str]:
    """Runs an op from `target`: the mean of its result, and the op's status."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**clean_environment(), "PYTHONPATH": str(target)},
        cwd=target,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    file, mean, native, reason = json.loads(result.stdout)
    assert Path(file).is_relative_to(target)
    return mean, native, reason


def warnings_of(result: subprocess.CompletedProcess) -> list[str]:
    lines = (result.stdout + result.stderr).splitlines()
    return [line for line in lines if "without its compiled library" in line]


def test_installs_and_runs_without_a_compiler(sources, tmp_path):
    target = tmp_path / "target"
    result = install(sources, target, CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(warnings_of(result)) == 1
    assert not list(target.rglob("*.so"))
    mean, native, reason = probe(target)
    assert mean == 6.0
    assert not native
    assert reason.startswith("library not built: cmake failed") and "/nonexistent/c++" in reason


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"DIVE_FAST_REQUIRE_EXTENSION": "1", "CXX": "/nonexistent/c++"}, "cmake failed"),
        ({"FORCE_CUDA": "1", "CUDA_HOME": ""}, "FORCE_CUDA is set and CUDA_HOME must be"),
    ],
)
def test_a_required_library_that_cannot_be_built_fails_the_install(
    sources, tmp_path, asked, reason
):
    result = install(sources, tmp_path / "target", **asked)
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert f"the compiled library is required, but {reason}" in said


def test_installs_on_request_without_the_library_and_survives_a_broken_one(sources, tmp_path):
    target = tmp_path / "target"
    result = install(sources, target, DIVE_FAST_NO_EXTENSION="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert probe(target) == (6.0, False, "library not built: DIVE_FAST_NO_EXTENSION is set")

    (target / "dive_fast" / "_C.so").write_bytes(b"of another machine")
    mean, native, reason = probe(target)
    assert (mean, native) == (6.0, False)
    assert reason.startswith("built for torch ") and ", running " in reason


@pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler",
)
def test_an_install_holds_the_library(sources, tmp_path):
    """With a compiler that optimises nothing, for time; make itself has built with all flags."""
    target, compiler = tmp_path / "target", tmp_path / "c++"
    real = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    compiler.write_text(f'#!/bin/sh\nexec "{real}" "$@" -O0\n')
    compiler.chmod(0o755)
    result = install(sources, target, DIVE_FAST_REQUIRE_EXTENSION="1", CXX=str(compiler))
    assert result.returncode == 0, result.stdout + result.stderr
    assert warnings_of(result) == []
    mean, native, reason = probe(target)
    assert (mean, native) == (6.0, True), reason
    info = subprocess.run(
        [
            sys.executable,
            "-c",
            "from dive_fast import _build_info as info; print(info.compiler, info.flags)",
        ],
        env={**clean_environment(), "PYTHONPATH": str(target)},
        cwd=target,
        capture_output=True,
        text=True,
    )
    assert "-O3" in info.stdout, info.stderr
