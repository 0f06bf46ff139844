"""What a class-conditional model learns, step by step, and how it is doing.

    e(y) = || target - network(x_t, t, y) ||^2 / dim
    loss = e(y) + lambda CE

target is eps (ddpm), eps - x0 (flow) or x0; CE, of ``classes_rivals``, is optional.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dive_fast.core.convention import Convention
from dive_fast.models.autoencoder import Autoencoder
from dive_fast.training.classes_config import SCHEDULERS, ClassTrainingConfig
from dive_fast.training.classes_rivals import Contrast, with_rivals
from dive_fast.training.classes_samples import draw_samples

# x0 float32 [B, C, h, w] of the pictures at rows int64 [B].
Draw = Callable[[Tensor, torch.Generator], Tensor]


class Learner:
    """A network, what it learns, and how it is doing.

    Args:
        draw: x0 of training pictures by their rows.
        labels: of the training pictures.
        held_out, held_out_labels: x0 and classes of pictures that are never trained on.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        draw: Draw,
        labels: Tensor,
        held_out: Tensor,
        held_out_labels: Tensor,
        names: tuple[str, ...],
        vae: Autoencoder | None,
        config: ClassTrainingConfig,
    ) -> None:
        self.transformer, self.draw, self.labels = transformer, draw, labels
        self.held_out, self.held_out_labels = held_out, held_out_labels
        self.names, self.vae, self.config = names, vae, config
        scheduler = SCHEDULERS[config.objective]()
        stated: dict[str, Any] = {"_class_name": type(scheduler).__name__, **scheduler.config}
        self.convention = Convention.from_config(stated)
        self.contrast = Contrast() if config.contrast else None
        self.device = transformer.device
        # All that is trained; eval mode switches off diffusers' own label dropout.
        self.trained = nn.ModuleList(filter(None, [transformer, self.contrast])).eval()
        self.trained.to(self.device)
        self.done = 0

    def loss_of(self, step: int, generator: torch.Generator) -> Tensor:
        """The loss of one batch: of all its pictures with rivals, or some without their class."""
        config = self.config
        rows = torch.randint(len(self.labels), (config.batch_size,), generator=generator)
        x0, y = self.draw(rows, generator), self.labels[rows]
        none = torch.rand(len(y), generator=generator) < config.label_dropout
        t = spread_timesteps(len(y), len(self.convention.schedule), generator)
        eps = torch.randn(x0.shape, generator=generator)
        self.done = step + 1
        own = torch.where(none, config.num_classes, y)
        if self.contrast is None:
            return self.errors(x0, own, t, eps).mean()
        asked = with_rivals(y, config.num_classes, config.rivals, generator)
        asked[:, 0] = own
        each = [part.repeat_interleave(asked.shape[1], dim=0) for part in (x0, t, eps)]
        errors = self.errors(each[0], asked.flatten(), *each[1:]).view(asked.shape)
        # Pictures shown without their class have nothing to tell apart.
        named = errors[~none.to(self.device)]
        return errors[:, 0].mean() + config.contrast * self.contrast(named)

    def errors(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """e(y) = || target - prediction ||^2 / dim, float32 [B] on the network's device."""
        schedule = self.convention.schedule
        a, s = schedule.a[t][:, None, None, None], schedule.s[t][:, None, None, None]
        target = {"flow": eps - x0, "sample": x0}.get(schedule.target, eps)
        given = (a * x0 + s * eps, self.convention.told(t), y)
        with self.config.autocast(self.device):
            found = self.transformer(*(each.to(self.device) for each in given)).sample
        return (found.float() - target.to(self.device)).square().mean(dim=(1, 2, 3))

    def measured(self, out: Path) -> dict[str, float]:
        """The loss of held-out pictures with their class and with none; sometimes draws samples."""
        if self.done % self.config.samples_every == 0 or self.done == self.config.steps:
            draw_samples(self.transformer, self.convention, self.names, self.vae, out, self.done)
        generator = torch.Generator().manual_seed(self.config.seed)
        t = spread_timesteps(len(self.held_out), len(self.convention.schedule), generator)
        eps = torch.randn(self.held_out.shape, generator=generator)
        none = torch.full_like(self.held_out_labels, self.config.num_classes)
        labels = {"held_out": self.held_out_labels, "none": none}
        return {name: self._mean_loss(y, t, eps) for name, y in labels.items()}

    def _mean_loss(self, y: Tensor, t: Tensor, eps: Tensor) -> float:
        split = (x.split(self.config.batch_size) for x in (self.held_out, y, t, eps))
        parts = zip(*split, strict=True)
        return sum(self.errors(*part).sum().item() for part in parts) / len(y)


def spread_timesteps(n: int, n_timesteps: int, generator: torch.Generator) -> Tensor:
    """int64 [n], each uniform over the schedule, all of them evenly spread, in a random order."""
    u = (torch.randperm(n, generator=generator) + torch.rand(1, generator=generator)) / n
    return (u * n_timesteps).long().clamp(max=n_timesteps - 1)
