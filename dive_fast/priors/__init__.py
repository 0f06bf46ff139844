"""Diffusion priors over layouts: how usual a layout is, as the loss of denoising it."""

from dive_fast.priors.layout_prior import LayoutPrior
from dive_fast.priors.loading import fits, load_prior
from dive_fast.priors.penalty import LayoutPenalty
from dive_fast.priors.tokens import layout_tokens

__all__ = [
    "LayoutPenalty",
    "LayoutPrior",
    "fits",
    "layout_tokens",
    "load_prior",
]
