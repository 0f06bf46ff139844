"""The CUDA sources compile without a GPU, and the build decides about them as documented."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", ("nearest_box", "nearest_row"))
def test_the_sources_compile(source, tmp_path):
    """For both architectures at once; headers of a CPU build of torch are enough.

    Device code without optimisation: it takes half the time, and says the same of the sources.
    """
    command = [NVCC, "-c", "-std=c++20", "-O1", "-Xcicc", "-O0", "-Xptxas", "-O0"]
    command += ["-Werror=all-warnings"]
    command += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__path__[0]) / "include")]
    command += [str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(tmp_path / "object.o")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "object.o").stat().st_size > 10_000


def options_for(tmp_path: Path, *, cuda_torch: bool, **environment: str) -> tuple[str, str]:
    """What setup.py would tell CMake, or its error; and what it prints."""
    (tmp_path / "lib").mkdir(exist_ok=True)
    if cuda_torch:
        (tmp_path / "lib" / "libtorch_cuda.so").touch()
    script = (
        "import setuptools, sys; from pathlib import Path\n"
        "setuptools.setup = lambda **_: None\n"
        "import setup\n"
        "try: print('options', *setup.cuda_options(Path(sys.argv[1])))\n"
        "except setup.BuildError as error: print('error', error)\n"
    )
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CUDA_HOME", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")
    }
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**clean, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *printed, last = result.stdout.splitlines()
    return last, "\n".join([*printed, result.stderr])


@pytest.fixture
def toolkit(tmp_path) -> str:
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    return str(tmp_path / "toolkit")


def test_without_a_toolkit_or_on_request_there_is_no_cuda(tmp_path, toolkit):
    off = "options -DDIVE_FAST_CUDA=OFF"
    assert options_for(tmp_path, cuda_torch=True)[0] == off
    assert options_for(tmp_path, cuda_torch=True, CUDA_HOME=toolkit, FORCE_CUDA="0")[0] == off


def test_a_torch_without_cuda_is_said_and_fails_if_forced(tmp_path, toolkit):
    line, printed = options_for(tmp_path, cuda_torch=False, CUDA_HOME=toolkit)
    assert line == "options -DDIVE_FAST_CUDA=OFF"
    assert "without its CUDA kernels (torch must be a build with CUDA, but got" in printed
    line, _ = options_for(tmp_path, cuda_torch=False, CUDA_HOME=toolkit, FORCE_CUDA="1")
    assert line.startswith("error FORCE_CUDA is set and torch must be a build with CUDA")
    line, _ = options_for(tmp_path, cuda_torch=True, FORCE_CUDA="1")
    assert line == "error FORCE_CUDA is set and CUDA_HOME must be a CUDA toolkit, but got ''"


def test_architectures_have_a_printed_default(tmp_path, toolkit):
    line, printed = options_for(tmp_path, cuda_torch=True, CUDA_HOME=toolkit)
    assert line.endswith("ARCHITECTURES=80-real;86-real;89-real;90-real;90-virtual")
    assert "TORCH_CUDA_ARCH_LIST is not set: building for 8.0;8.6;8.9;9.0+PTX" in printed
    for names, expected in (("8.0 9.0a", "80-real;90a-real"), ("12.0+PTX", "120-real;120-virtual")):
        line, _ = options_for(
            tmp_path, cuda_torch=True, CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST=names
        )
        assert line.endswith(f"ARCHITECTURES={expected}")
    line, _ = options_for(
        tmp_path, cuda_torch=True, CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST="Hopper"
    )
    assert line.startswith("error TORCH_CUDA_ARCH_LIST must name architectures such as")
