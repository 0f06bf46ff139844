"""Diffusion priors over layouts: how usual a layout is, as the loss of denoising it."""

from dive_fast.priors.layout_prior import LayoutPrior, load_prior
from dive_fast.priors.tokens import layout_tokens
from dive_fast.priors.training import PriorTrainingConfig, train_prior

__all__ = ["LayoutPrior", "PriorTrainingConfig", "layout_tokens", "load_prior", "train_prior"]
