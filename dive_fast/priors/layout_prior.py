"""A diffusion prior over the token embeddings of layouts.

    v_t = a_t c v + s_t eps
    l(v; t, eps) = || eps - eps_phi(v_t, t) ||^2 / dim

with c the scalar that gives the embeddings unit variance. Source: DIVE (arXiv 2504.17253).

Objects have no order: the three embeddings of an object are one element of a set, and the
transformer sees the elements without positions.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dive_fast.errors import ModelError
from dive_fast.layouts import LayoutFormat
from dive_fast.models.checkpoint import load_component
from dive_fast.priors.blocks import Block, TimeEmbedding
from dive_fast.projection import SLOTS_PER_OBJECT
from dive_fast.schedule import Schedule, make_betas

CROP_SLOTS = 2


class LayoutPrior(ModelMixin, ConfigMixin):
    """Predicts the noise in the token embeddings of a layout.

    Args:
        embedding_dim: D, of the tokens' table.
        crop: the last two slots are the corners of a crop.
        width: of the transformer; at least 3 D, so that the noise of an object passes through.
        layers: of the transformer.
        heads: of each self-attention.
        scale: c, what embeddings are multiplied by.
        num_train_timesteps: T, of the linear DDPM schedule.
        layout: ``LayoutFormat.to_dict()``, of the layouts that it learned.
        table: ``table_digest`` of the tokens' table, whose embeddings it learned.

    Raises:
        ModelError: sizes that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        embedding_dim: int,
        crop: bool = False,
        width: int = 192,
        layers: int = 4,
        heads: int = 6,
        scale: float = 1.0,
        num_train_timesteps: int = 1000,
        layout: dict[str, Any] | None = None,
        table: str | None = None,
    ) -> None:
        super().__init__()
        object_dim = SLOTS_PER_OBJECT * embedding_dim
        if width < object_dim or width % heads or width % 2:
            raise ModelError(
                f"expected an even width of at least {object_dim} that {heads} heads divide, "
                f"got {width}."
            )
        self.schedule = Schedule.from_betas(make_betas("linear", num_train_timesteps))
        self.time = TimeEmbedding(width)
        self.object_in = nn.Linear(object_dim, width)
        self.object_out = nn.Linear(width, object_dim)
        if crop:
            self.crop_in = nn.Linear(CROP_SLOTS * embedding_dim, width)
            self.crop_out = nn.Linear(width, CROP_SLOTS * embedding_dim)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for linear in (self.object_out, *([self.crop_out] if crop else [])):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @classmethod
    def for_table(
        cls, layout: LayoutFormat, table: Tensor, tokens: Tensor, **sizes: int
    ) -> LayoutPrior:
        """An untrained prior over embeddings of a table.

        Args:
            layout: what the tokens mean.
            table: [V, D].
            tokens: int64 [N, S], the layouts whose embeddings are to have unit variance.
            **sizes: width, layers, heads.

        Raises:
            ModelError: sizes that do not fit together.
        """
        return cls(
            table.shape[1],
            crop=layout.crop,
            scale=1 / float(table[tokens].double().std()),
            layout=layout.to_dict(),
            table=table_digest(table),
            **sizes,
        )

    def forward(self, v_t: Tensor, t: Tensor) -> Tensor:
        """The noise in noised embeddings.

        Args:
            v_t: [B, S, D], of unit variance.
            t: int64 [B].

        Returns:
            [B, S, D].
        """
        end = v_t.shape[1] - (CROP_SLOTS if self.config.crop else 0)
        h = self.object_in(v_t[:, :end].unflatten(1, (-1, SLOTS_PER_OBJECT)).flatten(2))
        if self.config.crop:
            h = torch.cat([h, self.crop_in(v_t[:, end:].flatten(1))[:, None]], dim=1)
        time = self.time(t)
        for block in self.blocks:
            h = block(h, time)
        h = self.norm(h)
        objects = h[:, : end // SLOTS_PER_OBJECT]
        parts = [self.object_out(objects).unflatten(2, (SLOTS_PER_OBJECT, -1)).flatten(1, 2)]
        if self.config.crop:
            parts.append(self.crop_out(h[:, -1]).unflatten(1, (CROP_SLOTS, -1)))
        a, s = self._factors(t, v_t)
        # The network itself gives a eps - s v, which is of one size at every t.
        return s * v_t + a * torch.cat(parts, dim=1)

    def noised(self, v: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """v_t = a_t c v + s_t eps, what ``forward`` takes; v and eps [B, S, D], t int64 [B]."""
        a, s = self._factors(t, v)
        return a * self.config.scale * v + s * eps

    def losses(self, v: Tensor, timesteps: Tensor, noises: Tensor) -> Tensor:
        """How badly each layout is denoised at each probe; lower is more usual.

        A noise belongs to a slot. Layouts are compared fairly where their common objects meet
        equal noises: in the same slots, or with one noise for all objects (``LayoutPenalty``).

        Args:
            v: token embeddings, rows of the table or anything between them, [N, S, D].
            timesteps: int64 [k], in [0, T).
            noises: [k, S, D].

        Returns:
            [N, k], differentiable in ``v``.

        Raises:
            ModelError: shapes that do not fit, or timesteps out of range.
        """
        self._check(v, timesteps, noises)
        n, k = len(v), len(timesteps)
        # On v's dtype: a search differentiates by v, whatever precision the prior computes in.
        rows = v.to(self.dtype).repeat_interleave(k, dim=0)
        t = timesteps.to(v.device).repeat(n)
        eps = noises.to(rows).repeat(n, 1, 1)
        squares = (eps - self(self.noised(rows, t, eps), t)).square().flatten(1)
        return squares.mean(dim=1).view(n, k).to(v.dtype)

    def _factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t, [B, 1, 1]."""
        a, s = self.schedule.a.to(like)[t], self.schedule.s.to(like)[t]
        return a[:, None, None], s[:, None, None]

    def _check(self, v: Tensor, timesteps: Tensor, noises: Tensor) -> None:
        crop, dim = CROP_SLOTS if self.config.crop else 0, self.config.embedding_dim
        good = v.dim() == 3 and v.shape[2] == dim and v.shape[1] > crop
        if not good or (v.shape[1] - crop) % SLOTS_PER_OBJECT:
            extra = f" + {CROP_SLOTS}" if crop else ""
            raise ModelError(
                f"expected token embeddings [N, {SLOTS_PER_OBJECT} x objects{extra}, {dim}], "
                f"got {list(v.shape)}."
            )
        if noises.dim() != 3 or noises.shape[1:] != v.shape[1:]:
            raise ModelError(
                f"expected noises [k, {v.shape[1]}, {dim}] for these embeddings, "
                f"got {list(noises.shape)}."
            )
        if timesteps.dtype != torch.int64 or timesteps.shape != noises.shape[:1]:
            raise ModelError(
                f"expected timesteps int64 of shape [{len(noises)}], "
                f"got {timesteps.dtype} {list(timesteps.shape)}."
            )
        steps = len(self.schedule)
        if len(timesteps) and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < steps:
            raise ModelError(
                f"expected timesteps in [0, {steps}), got {int(timesteps.min())} to "
                f"{int(timesteps.max())}."
            )


def table_digest(table: Tensor) -> str:
    """Tells one table of token embeddings from another, in whichever precision it is stored."""
    # Models are saved in half precision at least, and so are these bytes.
    content = table.detach().cpu().half().contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def load_prior(directory: str | Path, layout: LayoutFormat, table: Tensor) -> LayoutPrior:
    """Reads what ``LayoutPrior.save_pretrained`` wrote, frozen, in float32.

    Args:
        layout, table: of the model that it is to be used with.

    Raises:
        ModelError: a part is missing or broken, or the prior is of another model's layouts.
    """
    directory = Path(directory)
    prior = load_component(LayoutPrior, directory, allow_pickle=False)
    if not (math.isfinite(prior.config.scale) and prior.config.scale > 0):
        raise ModelError(
            f"expected a positive scale in {directory / 'config.json'}, got {prior.config.scale}."
        )
    if not fits(prior, layout, table):
        raise ModelError(
            f"{directory} holds a prior of another model: expected the layouts and the token table "
            "of this one (dive-fast train-prior makes one)."
        )
    return prior


def fits(prior: LayoutPrior, layout: LayoutFormat, table: Tensor) -> bool:
    """Whether a prior is over these layouts in the embeddings of this table."""
    return prior.config.layout == layout.to_dict() and prior.config.table == table_digest(table)
