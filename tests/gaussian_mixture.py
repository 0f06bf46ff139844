"""A toy diffusion model whose score, losses and posterior are known in closed form.

Class c is the Gaussian N(mu_c, sigma^2 I) over small images, with equal priors. Its class vector
is mu_c itself, so the condition is continuous and the vocabulary is the table of the means.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GaussianMixture:
    """C Gaussians over images [ch, h, w], D = ch * h * w.

    Attributes:
        table: [C, D] float32, the means; row c is the class vector of class c.
        sigma: the standard deviation that all classes share.
        shape: (ch, h, w).
    """

    def __init__(self, means: Tensor, sigma: float) -> None:
        if means.ndim != 4 or means.numel() == 0:
            raise ValueError(f"means must be [C, ch, h, w], not empty, got {list(means.shape)}.")
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}.")
        self.shape = tuple(means.shape[1:])
        self.table = means.flatten(1).float()
        self.sigma = float(sigma)

    @classmethod
    def random(
        cls,
        n_classes: int,
        shape: tuple[int, int, int],
        *,
        sigma: float = 0.5,
        spread: float = 1.0,
        seed: int = 0,
    ) -> GaussianMixture:
        """Means drawn from N(0, spread^2 I)."""
        generator = torch.Generator().manual_seed(seed)
        return cls(spread * torch.randn(n_classes, *shape, generator=generator), sigma)

    @property
    def unconditional(self) -> Tensor:
        """[D]: the mean of the means, the neutral vector (not the mixture's own score)."""
        return self.table.mean(dim=0)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images x0 [n, ch, h, w] float32 and their classes [n] int64."""
        labels = torch.randint(len(self.table), (n,), generator=generator)
        noise = torch.randn(n, *self.shape, generator=generator)
        return self.table[labels].view(n, *self.shape) + self.sigma * noise, labels

    def predict(self, x_t: Tensor, a: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """E[eps | x_t, v] = s (x_t - a v) / (a^2 sigma^2 + s^2), the variance of x_t below.

        x_t [M, ch, h, w], a and s [M], v [M, D]; returns [M, ch, h, w], differentiable in v.
        """
        a, s = a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
        variance = a**2 * self.sigma**2 + s**2
        return s * (x_t - a * v.view(-1, *self.shape)) / variance

    def expected_loss(self, x0: Tensor, c: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """E_eps || eps - predict(a x0 + s eps, v = mu_c) ||^2 / D, the loss a probe estimates.

        With V = a^2 sigma^2 + s^2 it is (a^2 sigma^2 / V)^2 + (a s / V)^2 || x0 - mu_c ||^2 / D:
        at every timestep it ranks the classes as the posterior does.

        x0 [B, ch, h, w], c [N] int64, a and s [K]; returns [B, N, K] float64.
        """
        a, s = a.double(), s.double()
        variance = a**2 * self.sigma**2 + s**2
        distance = self._square_distance(x0)[:, c, None] / self.table.shape[1]
        return (a**2 * self.sigma**2 / variance) ** 2 + (a * s / variance) ** 2 * distance

    def log_posterior(self, x0: Tensor) -> Tensor:
        """log p(c | x0) = log softmax_c(-|| x0 - mu_c ||^2 / (2 sigma^2)): [B, C] float64."""
        return torch.log_softmax(-self._square_distance(x0) / (2 * self.sigma**2), dim=1)

    def _square_distance(self, x0: Tensor) -> Tensor:
        """|| x0 - mu_c ||^2 for every image and class: [B, C] float64."""
        difference = x0.flatten(1).double()[:, None] - self.table.double()
        return difference.square().sum(dim=2)
