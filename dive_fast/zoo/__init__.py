"""Small models that come with the package, trained by this project on real images."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """The zoo's models."""
    return tuple(sorted(path.parent.name for path in _WEIGHTS.glob("*/model_index.json")))


def path(name: str) -> Path:
    """The model directory of ``name``, as diffusers writes one."""
    return _WEIGHTS / name
