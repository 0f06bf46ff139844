"""Priors from directories, each for the one model whose layouts it learned."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dive_fast.core.config import LARGEST_FLOAT
from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.numbers import is_number
from dive_fast.errors import ModelError, shown
from dive_fast.models.files.checkpoint import load_component
from dive_fast.models.files.reading import read_json
from dive_fast.priors.layout_prior import LayoutPrior, table_digest


def load_prior(directory: str | Path, layout: LayoutFormat, table: Tensor) -> LayoutPrior:
    """Reads what ``LayoutPrior.save_pretrained`` wrote, frozen, in float32.

    Args:
        layout, table: of the model that it is to be used with.

    Raises:
        ModelError: a part is missing or broken, or the prior is of another model's layouts.
    """
    directory = Path(directory)
    _check_scale(directory / "config.json")
    prior = load_component(LayoutPrior, directory, allow_pickle=False)
    if not fits(prior, layout, table):
        raise ModelError(
            f"{directory} holds a prior of another model: expected the layouts and the token table "
            "of this one (dive-fast train-prior makes one)."
        )
    prior.attach(table)
    return prior


def fits(prior: LayoutPrior, layout: LayoutFormat, table: Tensor) -> bool:
    """Whether a prior is over these layouts in the embeddings of this table."""
    return prior.config.layout == layout.to_dict() and prior.config.table == table_digest(table)


def _check_scale(path: Path) -> None:
    """Before anything is built: embeddings are multiplied by it."""
    scale = read_json(path).get("scale", 1.0) if path.exists() else 1.0
    if not (is_number(scale) and 0 < scale <= LARGEST_FLOAT):
        raise ModelError(f"expected a positive scale in {path}, got {shown(scale)}.")
