"""Imports point downwards only: between the floors of the house, and inside every folder."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dive_fast"

# From the top to the bottom: a room may import what stands on a lower floor, and itself. Eleven
# floors; docs/architecture.md says what is where.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("app", "report"),
    ("training",),
    ("evaluation",),
    ("compat", "predict"),
    ("accelerator", "engine", "priors"),
    ("data", "logs", "models", "strategies"),
    ("core",),
    ("kernels", "ops"),
    ("errors", "zoo"),
)
RANK = {name: rank for rank, floor in enumerate(FLOORS) for name in floor}
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


def folders() -> list[str]:
    """All packages below ``dive_fast``, in dots."""
    return [module for module, path in modules() if path.name == "__init__.py"]


def inner_imports(folder: str, sources: dict[str, str]) -> dict[str, set[str]]:
    """Which rooms of a folder import which others of it; "" is its face, the ``__init__``.

    Args:
        folder: in dots.
        sources: of all modules, by their names in dots.
    """
    own = {m for m in sources if m == folder or m.startswith(f"{folder}.")}

    def room(module: str) -> str:
        return module.removeprefix(folder).lstrip(".").split(".")[0]

    rooms = {room(module) for module in own}
    edges: dict[str, set[str]] = {name: set() for name in rooms}
    for module in own:
        is_package = any(other.startswith(f"{module}.") for other in sources)
        package = module if is_package else module.rpartition(".")[0]
        for name in imported_names(sources[module], package):
            if name != folder and not name.startswith(f"{folder}."):
                continue
            target = room(name)
            # A name that is no room is one that the face hands on.
            target = target if target in rooms else ""
            if target != room(module):
                edges[room(module)].add(target)
    return edges


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """Rooms that import each other in a loop."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def arrows() -> set[tuple[str, str]]:
    """(room, imported room) of the house: folders and files directly below ``dive_fast``."""
    found = set()
    for module, path in modules():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        own = module.split(".")[1]
        for name in imported_names(path.read_text(), package):
            top, *rest = name.split(".")
            if top == "dive_fast" and rest and rest[0] in RANK and rest[0] != own:
                found.add((own, rest[0]))
    return found


def test_every_room_has_its_floor() -> None:
    found = {module.split(".")[1] for module, _ in modules()}
    # kernels/ is installed as a package, and lies beside this one.
    assert found == set(RANK) - {"kernels"}
    assert len(FLOORS) == 11


def test_the_page_on_architecture_has_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [name for name in RANK if f"`{name}`" not in page and f"`{name}/`" not in page]
    assert rooms == []


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_point_downwards(module: str, path: Path) -> None:
    assert wrong_imports(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize("folder", folders())
def test_no_circles_inside_a_folder(folder: str) -> None:
    sources = {module: path.read_text() for module, path in modules()}
    assert circle(inner_imports(folder, sources)) is None


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("dive_fast.engine.engine", "from dive_fast.cli import main", True),
        ("dive_fast.engine.engine", "def f():\n    import dive_fast.predict.classifier as c", True),
        ("dive_fast.strategies.race", "if True:\n    from dive_fast import models", True),
        ("dive_fast.engine.engine", "from ..predict import DiffusionClassifier", True),
        ("dive_fast.models.dit.model", "from ...engine import Engine", True),
        ("dive_fast.models.gligen", "from .. import predict", True),
        ("dive_fast.core.schedule", "from dive_fast.data import DataSet", True),
        ("dive_fast.engine.engine", "from bench.baselines import dive", True),
        ("dive_fast.engine.engine", "from dive_fast.errors import ImageError", False),
        ("dive_fast.models.gligen", "from .files.checkpoint import read_json", False),
        ("dive_fast.models.gligen", "from dive_fast import __version__", False),
        ("dive_fast.engine.engine", "from torch import predict", False),
    ],
)
def test_the_check_itself(module: str, source: str, wrong: bool) -> None:
    assert bool(wrong_imports(module, source)) == wrong


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"p.a": "from p import b", "p.b": "import p.a"}, {"a", "b"}),
        ({"p.a": "from p.c.d import x", "p.c.d": "", "p.c": "from p.a import y"}, {"a", "c"}),
        ({"p.a": "from p import name", "p": "from p.a import name"}, {"", "a"}),
        ({"p": "from p.a import name", "p.a": "from p.b import x", "p.b": "import q"}, None),
    ],
)
def test_the_check_of_circles_itself(sources: dict[str, str], expected: set[str] | None) -> None:
    found = circle(inner_imports("p", sources))
    assert (found if found is None else set(found)) == expected


def test_no_test_module_imports_another() -> None:
    """What several of them need lies in a helper module or in conftest.py."""
    tests = sorted(Path(__file__).parent.rglob("test_*.py"))
    assert len(tests) > 50
    names = {path.stem for path in tests}
    for path in tests:
        imported = " ".join(imported_names(path.read_text(), "")).replace(".", " ").split()
        assert names.isdisjoint(imported), path


@pytest.mark.parametrize("arguments", [["-c", "import dive_fast, sys"], ["-m", "dive_fast", "-h"]])
def test_light_imports(arguments: list[str]) -> None:
    """Neither the import of the package nor the help waits for torch."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dive_fast" in loaded
    assert loaded & {"torch", "diffusers", "numpy", "PIL"} == set()


if __name__ == "__main__":
    lines = [path.read_text().count("\n") for _, path in modules()]
    print(f"{len(set(RANK) - {'kernels'})} rooms on {len(FLOORS)} floors, {len(arrows())} arrows")
    print(f"{len(lines)} files, {sum(lines)} lines")
