"""The analytic Gaussian mixture as a model that the engine can run."""

from __future__ import annotations

from typing import Any

import torch
from gaussian_mixture import GaussianMixture

from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.core.vocabulary import Vocabulary


class ToyModel:
    """``GaussianMixture`` behind ``dive_fast.models.protocol.Model``."""

    def __init__(self, n_classes: int = 6, seed: int = 0, spread: float = 1.0) -> None:
        self.toy = GaussianMixture.random(n_classes, (2, 3, 3), spread=spread, seed=seed)
        self.name = "toy"
        self.schedule = Schedule.from_betas(make_betas("linear", 1000))
        names = [f"class {c}" for c in range(n_classes)]
        self.vocabulary = Vocabulary(self.toy.table, names, self.toy.unconditional)
        self.latent_shape = self.image_shape = self.toy.shape
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.inverse_temperature = 9.0
        self.rows: list[int] = []  # of every forward
        self.memory = 10**9  # rows that fit

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        if len(x_t) > self.memory:
            raise torch.OutOfMemoryError(f"{len(x_t)} rows do not fit")
        self.rows.append(len(x_t))
        return self.toy.predict(x_t, self.schedule.a[t], self.schedule.s[t], condition)
