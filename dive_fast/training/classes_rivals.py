"""Other classes asked of the same noisy picture, for a model that is to tell classes apart.

A model that only learns to denoise hardly needs the class where x_t shows the object by itself. As
a classifier it does: the right class must explain the picture better than others. So the training
adds

    CE = -log softmax_y(-kappa e(y))_right,    e(y) = || target - network(x_t, t, y) ||^2 / dim

over the right class and k rivals on the same (t, eps). kappa, which beta is in the classifier, is
learned along and not kept: beta is fitted afterwards, to pictures that were held out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KAPPA = 300.0  # at the beginning


class Contrast(nn.Module):
    """The cross-entropy, with its kappa."""

    def __init__(self) -> None:
        super().__init__()
        self.log_kappa = nn.Parameter(torch.tensor(KAPPA).log())

    def forward(self, errors: Tensor) -> Tensor:
        """The mean of -log p(right class), a scalar; 0 of no pictures.

        Args:
            errors: e, float [B, 1 + k], the right class first.
        """
        logits = -self.log_kappa.exp() * errors
        return -logits.log_softmax(dim=1)[:, 0].sum() / max(1, len(errors))


def with_rivals(y: Tensor, n_classes: int, count: int, generator: torch.Generator) -> Tensor:
    """Each class, then ``count`` others in a random order, or all where there are fewer.

    Args:
        y: int64 [B], below ``n_classes``.

    Returns:
        int64 [B, 1 + k], no class twice in a row.
    """
    shifts = torch.rand(len(y), n_classes - 1, generator=generator).argsort(dim=1) + 1
    return torch.cat([y[:, None], (y[:, None] + shifts[:, :count]) % n_classes], dim=1)
