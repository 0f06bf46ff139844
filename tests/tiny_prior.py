"""Small priors over layouts, and layouts that one can learn."""

from __future__ import annotations

import torch
from torch import Tensor

from dive_fast.core.layouts import Layout, LayoutFormat
from dive_fast.priors import LayoutPrior

FORMAT = LayoutFormat.compact(("left", "right"), max_objects=3, grid=5)
TABLE = torch.randn(FORMAT.vocabulary_size, 8, generator=torch.Generator().manual_seed(0))


def pairs(seed: int, n: int = 64) -> Tensor:
    """Two objects of one size side by side in one row, "left" before "right"; a third is absent."""
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for x, y in torch.randint(3, (n, 2), generator=generator).tolist():
        boxes = torch.tensor([[x, y, x + 1, y + 2], [x + 1, y, x + 2, y + 2]]) / 4.0
        rows.append(FORMAT.encode(Layout(boxes, torch.tensor([0, 1]))))
    return torch.stack(rows)


def make_prior(form: LayoutFormat = FORMAT, table: Tensor = TABLE, width: int = 32) -> LayoutPrior:
    """Random weights all over, so that everything matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = torch.randint(len(table), (20, form.n_slots))
        prior = LayoutPrior.for_table(form, table, tokens, width=width, layers=2, heads=2)
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.normal_(std=0.2)
    return prior.eval().requires_grad_(False)


def make_prior_against_objects(model) -> LayoutPrior:
    """Whatever it sees, it expects no object."""
    table, form = model.vocabulary.table, model.layout_format
    tokens = torch.arange(form.n_slots)[None] % form.vocabulary_size
    prior = LayoutPrior.for_table(form, table, tokens, width=16, layers=1, heads=2)
    n_class, n_corner = len(form.names) + 1, 2 * form.grid + 1
    none = torch.tensor([n_class, n_class + n_corner, n_class + 2 * n_corner]) - 1
    with torch.no_grad():
        prior.object_out.bias[none] = 20.0
    return prior.eval().requires_grad_(False)
