"""Imports point downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dive_fast"

# From the top to the bottom: a module may import what stands on a lower line, and its own package.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("demo", "demo_detection"),
    ("evaluate_detections",),
    ("train_pictures", "train_prior"),
    ("conventions", "evaluate", "fitting_layout", "train", "train_layout"),
    ("classify", "compat", "detect"),
    ("fitting",),
    ("strategies",),
    ("engine",),
    ("forward",),
    ("accelerator", "averaging", "cache", "calibration", "objective", "packing", "results"),
    ("coco_scores", "detections"),
    ("drawing",),
    ("priors", "sampling"),
    ("models",),
    ("shortlist", "timesteps"),
    ("options", "probes", "requests", "schedule", "vocabulary"),
    ("data",),
    ("zoo",),
    ("coco",),
    ("layouts",),
    ("projection",),
    ("image_paths", "images", "rundir"),
    ("ops",),
    ("_native", "kernels", "matching"),
    ("errors",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# What must never be needed by the library itself.
OUTSIDE = ("bench", "tests")


def imported_names(source: str, package: str) -> Iterator[str]:
    """Every module that a source imports, in dots, also inside functions.

    ``package`` is the one that the source lies in, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            # "from dive_fast import ops" names a module, "from dive_fast.ops import q_sample" not.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_imports(module: str, source: str, is_package: bool = False) -> list[str]:
    """The imports of ``module`` (in dots) that point upwards, sideways or outside."""
    package = module if is_package else module.rpartition(".")[0]
    own = module.split(".")[1]
    wrong = []
    for name in imported_names(source, package):
        top, *rest = name.split(".")
        if top in OUTSIDE:
            wrong.append(f"{module} imports {name}")
        # dive_fast itself holds the version and lazy names; a name that is no module is no import.
        if top != "dive_fast" or not rest or rest[0] not in RANK or rest[0] == own:
            continue
        if RANK[rest[0]] <= RANK[own]:
            wrong.append(f"{module} imports {name}")
    return wrong


def modules() -> Iterator[tuple[str, Path]]:
    """All modules below ``dive_fast``, without its own ``__init__``, whose imports are lazy."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("dive_fast", "__init__"):
            yield ".".join(parts).removesuffix(".__init__"), path


def test_every_module_has_its_place() -> None:
    found = {module.split(".")[1] for module, _ in modules()}
    assert "classify" in found
    assert found - set(RANK) == set()


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_point_downwards(module: str, path: Path) -> None:
    assert wrong_imports(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("dive_fast.engine", "from dive_fast.cli import main", True),
        ("dive_fast.engine", "def f():\n    import dive_fast.predict.classifier as c", True),
        ("dive_fast.engine", "if True:\n    from dive_fast import strategies", True),
        ("dive_fast.engine", "from .classify import DiffusionClassifier", True),
        ("dive_fast.models.dit.model", "from ..engine import Engine", True),
        ("dive_fast.models.dit.model", "from .. import classify", True),
        ("dive_fast.core.schedule", "from dive_fast.core.probes import ProbeList", True),
        ("dive_fast.engine", "from bench.baselines import dive", True),
        ("dive_fast.engine", "from dive_fast.errors import ImageError", False),
        ("dive_fast.models.dit.model", "from .checkpoint import read_json", False),
        ("dive_fast.models.dit.model", "from dive_fast import __version__", False),
        ("dive_fast.engine", "from torch import classify", False),
    ],
)
def test_the_check_itself(module: str, source: str, wrong: bool) -> None:
    assert bool(wrong_imports(module, source)) == wrong


@pytest.mark.parametrize("arguments", [["-c", "import dive_fast, sys"], ["-m", "dive_fast", "-h"]])
def test_light_imports(arguments: list[str]) -> None:
    """Neither the import of the package nor the help waits for torch."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dive_fast" in loaded
    assert loaded & {"torch", "diffusers", "numpy", "PIL"} == set()
