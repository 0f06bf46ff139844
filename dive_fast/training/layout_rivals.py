"""Layouts that nearly explain an image, for a layout-to-image model that is to tell them apart.

A model that only learns to denoise need not care for the layout where x_t shows the objects by
itself. As a detector it has to: the annotated layout must explain the image better than one with an
object too few or too many, elsewhere, or of another class. So the training adds

    CE = -log softmax_y(-kappa log e(y))_annotated,    e(y) = || x0 - x0_theta(x_t, t, y) ||^2

over the annotated layout and a few rivals on the same (t, eps). The logarithm, as in the likelihood
of a Gaussian of unknown variance, makes all timesteps count alike. kappa is learned along and not
kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KAPPA = 20.0  # at the beginning


class Contrast(nn.Module):
    """The cross-entropy, with its kappa."""

    def __init__(self) -> None:
        super().__init__()
        self.log_kappa = nn.Parameter(torch.tensor(KAPPA).log())

    def forward(self, errors: Tensor, same: Tensor) -> Tensor:
        """The mean of -log p(annotated), a scalar.

        Args:
            errors: e, float [B, 1 + k], the annotated layout's first.
            same: bool [B, k], rivals that are the annotated layout; they do not count.
        """
        logits = -self.log_kappa.exp() * errors.log()
        logits = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(same, -torch.inf)], dim=1)
        return -logits.log_softmax(dim=1)[:, 0].mean()
