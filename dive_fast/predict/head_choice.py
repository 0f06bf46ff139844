"""Which layer, timestep and penalty a head gets: a training part, a validation part, a score."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dive_fast.core.head import Head
from dive_fast.errors import DiveFastError
from dive_fast.predict.head_training import (
    PENALTIES,
    Weights,
    as_losses,
    train_attention,
    train_linear,
    train_losses,
)

CHOICE_IMAGES = 1000  # on which layer and timestep are chosen; five of each class if those are more
GRIDS = (1, 2, 4)  # that are tried, the layers and timesteps under the last


@dataclass(frozen=True)
class Trial:
    """What a layer, a timestep and a grid are worth to a ridge, which is learned at once.

    Attributes:
        score: on the validation part, the mean of 1 / rank of the right class; of kind "losses" of
            the class that has the lowest loss. Less a matter of luck than accuracy, if classes are
            many.
    """

    layer: str
    timestep: int
    grid: int
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

    def train(self, features: torch.Tensor, rows: torch.Tensor, penalty: float | None) -> Weights:
        """A head of the features [n, ...] of the images ``rows`` [n]."""
        targets = self.targets[rows]
        if self.kind == "losses":
            return train_losses(features, targets)
        if self.kind == "attention":
            return train_attention(features, targets, self.n_classes, self.seed)
        return train_linear(features, targets, self.n_classes, penalty)

    def score(self, scores: torch.Tensor, rows: torch.Tensor) -> float:
        """See ``Trial.score``; of what a head says [n, C] of held-out images ``rows`` [n]."""
        targets = self.targets[rows]
        best = targets.argmin(dim=1) if self.kind == "losses" else targets
        rank = 1 + (scores > scores.gather(1, best[:, None])).sum(dim=1)
        return (1 / rank.double()).mean().item()

    def tried(self, features: torch.Tensor, rows: torch.Tensor, n: int) -> float:
        """The score of a ridge on features.

        Args:
            features: float32 [B, D] of the images ``rows`` [B], of which the first ``n`` train.
        """
        targets = self.targets[rows[:n]]
        losses = targets if self.kind == "losses" else as_losses(targets, self.n_classes)
        found = train_losses(features[:n], losses)
        z = (features[n:] - found.mean) / found.scale
        return self.score(-(z @ found.weight.T + found.bias), rows[n:])

    def best(
        self,
        features: torch.Tensor,
        train: torch.Tensor,
        held: torch.Tensor,
    ) -> tuple[Weights, torch.Tensor]:
        """The head of the best penalty, of the training part alone, and its scores [held, C].

        Args:
            features: of all images.
        """
        # The other kinds choose their own penalty, or have one.
        penalties = PENALTIES if self.kind == "linear" else (None,)
        found = []
        for penalty in penalties:
            weights = self.train(features[train], train, penalty)
            head = self.head(weights, Trial("trial", 0, 1, 0.0), "trial")
            found.append((weights, head.scores(features[held])))
        return max(found, key=lambda pair: self.score(pair[1], held))

    def head(
        self, weights: Weights, at: Trial, classes: str, recall: tuple[float, ...] = ()
    ) -> Head:
        return Head(
            layer=at.layer,
            timestep=at.timestep,
            grid=None if self.kind == "attention" else at.grid,
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
