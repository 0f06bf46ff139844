"""Which layer, timestep and penalty a head gets: a training part, a validation part, a score."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dive_fast.core.head import Head
from dive_fast.errors import DiveFastError
from dive_fast.predict.head_training import (
    PENALTIES,
    Weights,
    train_attention,
    train_linear,
    train_losses,
)

CHOICE_IMAGES = 1000  # on which layer and timestep are chosen
CHOICE_PENALTY = 0.1  # of the logistic regression meanwhile


@dataclass(frozen=True)
class Trial:
    """What a layer and a timestep are worth.

    Attributes:
        score: on the validation part, accuracy; of kind "losses" the mean of 1 / rank of the class
            that has the lowest loss.
    """

    layer: str
    timestep: int
    score: float


@dataclass(frozen=True)
class Learner:
    """One kind of head, and what it learns.

    Attributes:
        kind: "linear", "attention" or "losses".
        targets: labels int64 [B], or losses float32 [B, C].
        n_classes: C.
        seed: of the training's draws.
    """

    kind: str
    targets: torch.Tensor
    n_classes: int
    seed: int

    @property
    def pool(self) -> str | None:
        return None if self.kind == "attention" else "mean"

    def train(self, features: torch.Tensor, rows: torch.Tensor, penalty: float | None) -> Weights:
        """A head of the features [n, ...] of the images ``rows`` [n]."""
        targets = self.targets[rows]
        if self.kind == "losses":
            return train_losses(features, targets)
        if self.kind == "attention":
            return train_attention(features, targets, self.n_classes, self.seed)
        return train_linear(features, targets, self.n_classes, penalty)

    def score(self, weights: Weights, features: torch.Tensor, rows: torch.Tensor) -> float:
        """See ``Trial.score``; of the features [n, ...] of held-out images ``rows`` [n]."""
        scores = self.head(weights, "trial", 0, "trial").scores(features)
        if self.kind != "losses":
            return (scores.argmax(dim=1) == self.targets[rows]).double().mean().item()
        best = self.targets[rows].argmin(dim=1, keepdim=True)
        rank = 1 + (scores > scores.gather(1, best)).sum(dim=1)
        return (1 / rank.double()).mean().item()

    def tried(
        self,
        features: torch.Tensor,
        train: torch.Tensor,
        held: torch.Tensor,
        all_rows: torch.Tensor,
    ) -> float:
        """The score of one layer and timestep, under a penalty that suits most.

        Args:
            features: of the images ``all_rows`` [n], among them those of both parts.
        """
        at = torch.empty(int(all_rows.max()) + 1, dtype=torch.int64)
        at[all_rows] = torch.arange(len(all_rows))
        weights = self.train(features[at[train]], train, CHOICE_PENALTY)
        return self.score(weights, features[at[held]], held)

    def best(
        self, features: torch.Tensor, train: torch.Tensor, held: torch.Tensor
    ) -> tuple[Weights, float]:
        """The head of the best penalty, of the training part alone, and its score.

        Args:
            features: of all images.
        """
        # The other kinds choose their own penalty, or have one.
        penalties = PENALTIES if self.kind == "linear" else (None,)
        found = []
        for penalty in penalties:
            weights = self.train(features[train], train, penalty)
            found.append((weights, self.score(weights, features[held], held)))
        return max(found, key=lambda pair: pair[1])

    def head(
        self,
        weights: Weights,
        layer: str,
        timestep: int,
        classes: str,
        recall: tuple[float, ...] = (),
    ) -> Head:
        return Head(
            layer=layer,
            timestep=timestep,
            pool=self.pool,
            kind=self.kind,
            weight=weights.weight,
            bias=weights.bias,
            mean=weights.mean,
            scale=weights.scale,
            classes=classes,
            recall=recall,
            query=weights.query,
        )


def split(
    count: int, labels: torch.Tensor | None, share: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on and rows held out, int64, both in random order.

    With labels every class has its share of both, as far as that is possible.

    Raises:
        DiveFastError: one of the two would be empty.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    n = round(count * share)
    if n < 1 or n >= count:
        raise DiveFastError(
            f"a head needs images to train on and others to choose by, got {count} of which a "
            f"share of {share:g} is held out."
        )
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
    held = torch.zeros(count, dtype=torch.bool)
    held[order[((torch.arange(n) + 0.5) * count / n).long()]] = True
    mixed = torch.randperm(count, generator=generator)
    return mixed[~held[mixed]], mixed[held[mixed]]


def subset(train: torch.Tensor, held: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first rows of both parts, ``most`` in all, in the proportion of the parts."""
    total = len(train) + len(held)
    if total <= most:
        return train, held
    n = max(1, round(most * len(held) / total))
    return train[: most - n], held[:n]
