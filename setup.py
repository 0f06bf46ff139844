"""Builds the compiled library with CMake and ninja; everything else is in pyproject.toml.

Environment:
    DIVE_FAST_NO_EXTENSION=1       do not compile; the ops run on their plain-torch references.
    DIVE_FAST_REQUIRE_EXTENSION=1  fail if it cannot be compiled, instead of going on without.
    CUDA_HOME                      the CUDA toolkit; with it, and a torch with CUDA, the GPU
                                   kernels are built too.
    FORCE_CUDA=1                   fail if they cannot be built; FORCE_CUDA=0 leaves them out.
    TORCH_CUDA_ARCH_LIST           their architectures (default "8.0;8.6;8.9;9.0+PTX").
    MAX_JOBS                       compilers at once (default 2).
    CXX                            the C++ compiler (GCC 11 or clang 14, or later).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "_C.so"
BUILD_INFO = "_build_info" + sysconfig.get_config_var("EXT_SUFFIX")
RECORD = "_build_record.json"
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"


class BuildError(Exception):
    """Why the compiled library could not be built, in one line."""


class CMakeBuild(build_ext):
    """Compiles the library if it can, and leaves a record of why not if it cannot."""

    def run(self) -> None:
        for folder in {self._build_folder(), self._target_folder()}:
            for name in (LIBRARY, BUILD_INFO, RECORD):
                (folder / name).unlink(missing_ok=True)  # never install an older build's library
        reason = ""
        try:
            compile_library(self._target_folder())
        except BuildError as error:
            if is_set("DIVE_FAST_REQUIRE_EXTENSION") or is_set("FORCE_CUDA"):
                raise SystemExit(
                    f"dive_fast: the compiled library is required, but {error}"
                ) from None
            reason = str(error)
            print(
                f"warning: dive_fast is installed without its compiled library ({reason}); "
                "its ops run on plain torch",
                file=sys.stderr,
            )
        record = {"torch": torch_version() or "", "reason": reason}
        (self._target_folder() / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        names = [
            name
            for name in (LIBRARY, BUILD_INFO, RECORD)
            if (self._target_folder() / name).exists()
        ]
        return [str(self._build_folder() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {out: str(self._target_folder() / Path(out).name) for out in self.get_outputs()}

    def _build_folder(self) -> Path:
        return Path(self.build_lib).absolute() / "dive_fast"

    def _target_folder(self) -> Path:
        """Beside the sources for an editable install, in the wheel's tree otherwise."""
        folder = ROOT / "dive_fast" if self.inplace else self._build_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def compile_library(target: Path) -> None:
    """Configures and builds with CMake, and copies the two libraries to `target`."""
    if is_set("DIVE_FAST_NO_EXTENSION"):
        raise BuildError("DIVE_FAST_NO_EXTENSION is set")
    torch_root = package_folder("torch")
    pybind11_root = package_folder("pybind11")
    cmake, ninja = tool("cmake"), tool("ninja")
    cuda = cuda_options(torch_root)
    build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    run(
        # A cached compiler or torch of an earlier build must not win over today's.
        [cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        + [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release"]
        + [f"-DPython_EXECUTABLE={sys.executable}", f"-DTORCH_ROOT={torch_root}"]
        + [f"-DTORCH_VERSION={torch_version()}"]
        + [f"-Dpybind11_DIR={pybind11_root / 'share' / 'cmake' / 'pybind11'}"]
        + cuda
    )
    run([cmake, "--build", str(build), "--parallel", os.environ.get("MAX_JOBS", "2")])
    for name in (LIBRARY, BUILD_INFO):
        shutil.copy2(build / "lib" / name, target / name)


def cuda_options(torch_root: Path) -> list[str]:
    """CMake's options for the CUDA kernels; chosen by the toolkit, for a GPU may come later."""
    force = os.environ.get("FORCE_CUDA", "")
    home = os.environ.get("CUDA_HOME", "")
    if force == "0" or not (home or is_set("FORCE_CUDA")):
        return ["-DDIVE_FAST_CUDA=OFF"]
    nvcc = Path(home) / "bin" / "nvcc"
    missing = ""
    if not home or not nvcc.exists():
        missing = f"CUDA_HOME must be a CUDA toolkit, but got {home!r}"
    elif not (torch_root / "lib" / "libtorch_cuda.so").exists():
        missing = f"torch must be a build with CUDA, but got {torch_version()}"
    if missing:
        if is_set("FORCE_CUDA"):
            raise BuildError(f"FORCE_CUDA is set and {missing}")
        print(f"warning: dive_fast is built without its CUDA kernels ({missing})", file=sys.stderr)
        return ["-DDIVE_FAST_CUDA=OFF"]
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not architectures:
        architectures = CUDA_ARCHITECTURES
        print(f"TORCH_CUDA_ARCH_LIST is not set: building for {architectures}", flush=True)
    return [
        "-DDIVE_FAST_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={cmake_architectures(architectures)}",
    ]


def cmake_architectures(names: str) -> str:
    """Torch's spelling, "8.0;9.0+PTX", in CMake's, "80-real;90-real;90-virtual"."""
    result = []
    for name in names.replace(" ", ";").split(";"):
        if not name:
            continue
        number, _, ptx = name.partition("+")
        digits = number.replace(".", "")
        if not digits[:2].isdigit() or ptx not in ("", "PTX"):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must name architectures such as 8.0 or 9.0+PTX, got {name!r}"
            )
        result.append(f"{digits}-real")
        if ptx:
            result.append(f"{digits}-virtual")
    return ";".join(result)


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, flush=True)
    if result.returncode != 0:
        raise BuildError(f"{Path(command[0]).name} failed: {first_error(result.stdout)}")


def first_error(output: str) -> str:
    """The line of a CMake or compiler log that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if "error:" in line:
            return line
        if line.startswith("CMake Error"):
            return " ".join(lines[number + 1 : number + 3])  # the line after the place
    return lines[-1] if lines else "no output"


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(
            f"{name} is not installed in {sys.prefix} (build with --no-build-isolation)"
        )
    return Path(spec.origin).parent


def tool(name: str) -> str:
    """The path of cmake or ninja: of this environment, or else on PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise BuildError(f"{name} is not installed")
    return path


def torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


setup(
    packages=[*find_packages(include=["dive_fast", "dive_fast.*"]), "dive_fast.kernels"],
    package_dir={"dive_fast.kernels": "kernels"},
    # Named so that setuptools runs build_ext and marks the wheel as platform specific.
    ext_modules=[Extension("dive_fast._C", []), Extension("dive_fast._build_info", [])],
    cmdclass={"build_ext": CMakeBuild},
)
