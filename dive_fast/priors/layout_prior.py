"""A diffusion prior over the token embeddings of layouts.

    v_t = a_t c v + s_t eps
    l(v; t, eps) = || eps - eps_phi(v_t, t) ||^2 / dim

with c the scalar that gives the embeddings unit variance. Source: DIVE (arXiv 2504.17253).

An embedding is a row of a frozen table, so the best guess of the noise is known up to what the
other tokens say: with p over the tokens k that the slot can hold,

    log p(k | v_t) = <a_t c e_k, v_t> / s_t^2 - |a_t c e_k|^2 / (2 s_t^2) + f_phi(v_t, t)_k + const
    eps_phi(v_t, t) = (v_t - a_t c sum_k p(k | v_t) e_k) / s_t

and only f, what is usual beside the others, is left to learn. The same form for words: continuous
diffusion for categorical data (arXiv 2211.15089). Every slot may have a noise of its own (diffusion
forcing, arXiv 2407.01392); how much it has shows in the p of its token alone, which is what the
network reads, so it is told no timestep.

Objects have no order: the three tokens of an object are one element of a set, and the
transformer sees the elements without positions.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.numbers import is_number
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import load_component

CROP_SLOTS = 2
FEED_FORWARD = 4  # times the width


class LayoutPrior(ModelMixin, ConfigMixin):
    """Predicts the noise in the token embeddings of a layout.

    ``for_table`` and ``load_prior`` give it the table; without one it only holds weights.

    Attributes:
        embeddings: [V, D], of the tokens, or None.

    Args:
        layout: ``LayoutFormat.to_dict()``, of the layouts that it learned.
        width: of the transformer.
        layers: of the transformer.
        heads: of each self-attention.
        scale: c, what embeddings are multiplied by.
        num_train_timesteps: T, of the linear DDPM schedule.
        table: ``table_digest`` of the tokens' table, whose embeddings it learned.

    Raises:
        ModelError: sizes that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        layout: dict[str, Any],
        width: int = 192,
        layers: int = 2,
        heads: int = 4,
        scale: float = 1.0,
        num_train_timesteps: int = 1000,
        table: str | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or width % heads:
            raise ModelError(f"expected a width that {heads} heads divide, got {width}.")
        if num_train_timesteps < 2:
            raise ModelError(f"expected at least 2 timesteps, got {num_train_timesteps}.")
        self.layout = LayoutFormat.from_dict(layout)
        self.schedule = Schedule.from_betas(make_betas("linear", num_train_timesteps))
        # Not stored: it is the model's.
        self.register_buffer("embeddings", None, persistent=False)
        n_class, n_corner = len(self.layout.names) + 1, 2 * self.layout.grid + 1
        self.object_in = nn.Linear(n_class + 2 * n_corner, width)
        self.object_out = nn.Linear(width, n_class + 2 * n_corner)
        if self.layout.crop:
            self.crop_in = nn.Linear(CROP_SLOTS * n_corner, width)
            self.crop_out = nn.Linear(width, CROP_SLOTS * n_corner)
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            FEED_FORWARD * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        for linear in (self.object_out, *([self.crop_out] if self.layout.crop else [])):
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
        prior = cls(
            layout.to_dict(),
            scale=1 / float(table[tokens].double().std()),
            table=table_digest(table),
            **sizes,
        )
        prior.embeddings = table.detach().float().cpu()
        return prior

    def forward(self, v_t: Tensor, t: Tensor) -> Tensor:
        """The noise in noised embeddings.

        Args:
            v_t: [B, S, D], of unit variance.
            t: int64 [B], or [B, S] for noises that differ from slot to slot.

        Returns:
            [B, S, D].
        """
        a, s = self._factors(t, v_t)
        classes, corners = self.log_posteriors(v_t, t)
        class_rows, corner_rows = self._rows(v_t)
        mean = torch.empty_like(v_t)
        mean[:, self._class_slots(v_t)] = classes.exp() @ class_rows
        mean[:, self._corner_slots(v_t)] = corners.exp() @ corner_rows
        return (v_t - a * mean) / s

    def log_posteriors(self, v_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log p(k | v_t), of the slots for classes and of those for corners, in their order.

        Args:
            v_t, t: as for ``forward``.

        Returns:
            [B, n, C + 1] and [B, 2 n (+ 2 with a crop), G G + 1]; the last token is none.
        """
        a, s = (each.expand(-1, v_t.shape[1], -1) for each in self._factors(t, v_t))
        alone = []
        for slots, rows in zip(
            (self._class_slots(v_t), self._corner_slots(v_t)), self._rows(v_t), strict=True
        ):
            inner = v_t[:, slots] @ rows.t() - a[:, slots] / 2 * rows.square().sum(dim=1)
            alone.append(a[:, slots] / s[:, slots].square() * inner)
        classes, corners = (each.softmax(dim=2) for each in alone)
        of_classes, of_sides = self._context(classes, self._sides(corners))
        usual = (of_classes, self._corners(of_sides))
        classes, corners = (
            (one + other).log_softmax(dim=2) for one, other in zip(alone, usual, strict=True)
        )
        return classes, corners

    def positions(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens [B, S] stand in what ``log_posteriors`` returns, int64."""
        found = []
        slots = (self._class_slots(tokens), self._corner_slots(tokens))
        for at, (start, stop) in zip(slots, self._ranges(), strict=True):
            part = tokens[:, at]
            found.append(torch.where(part == self.layout.none, stop - start, part - start))
        return found[0], found[1]

    def _context(self, classes: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """f: from what each slot says of its own token to what the others make of it.

        Args:
            classes: [B, n, C + 1], probabilities.
            sides: [B, 2 n (+ 2), 2 G + 1], of columns, rows and none.

        Returns:
            Logits of the same shapes.
        """
        n, n_sides = classes.shape[1], sides.shape[2]
        inputs = torch.cat([classes, sides[:, : 2 * n].unflatten(1, (n, 2)).flatten(2)], dim=2)
        h = self.object_in(inputs)
        if self.layout.crop:
            h = torch.cat([h, self.crop_in(sides[:, 2 * n :].flatten(1))[:, None]], dim=1)
        h = self.blocks(h)
        out = self.object_out(h[:, :n])
        of_classes, of_sides = out.split([classes.shape[2], 2 * n_sides], dim=2)
        of_sides = of_sides.unflatten(2, (2, n_sides)).flatten(1, 2)
        if self.layout.crop:
            of_crop = self.crop_out(h[:, n]).unflatten(1, (CROP_SLOTS, n_sides))
            of_sides = torch.cat([of_sides, of_crop], dim=1)
        return of_classes, of_sides

    def _sides(self, corners: Tensor) -> Tensor:
        """Probabilities of corners [..., G G + 1] as those of columns, rows and none.

        A corner is its column and its row: neighbours on the grid share what is learned.
        """
        grid = self.layout.grid
        board = corners[..., :-1].unflatten(-1, (grid, grid))
        return torch.cat([board.sum(dim=-2), board.sum(dim=-1), corners[..., -1:]], dim=-1)

    def _corners(self, sides: Tensor) -> Tensor:
        """The sum of a column's and a row's part for each corner [..., G G + 1]; and of none."""
        columns, rows, none = sides.split([self.layout.grid, self.layout.grid, 1], dim=-1)
        board = rows[..., :, None] + columns[..., None, :]
        return torch.cat([board.flatten(-2), none], dim=-1)

    def _rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """c times the embeddings that slots for classes and for corners can hold, none last."""
        table = self.config.scale * self._attached().to(like)
        none = table[self.layout.none : self.layout.none + 1]
        classes, corners = (torch.cat([table[slice(*each)], none]) for each in self._ranges())
        return classes, corners

    def _attached(self) -> Tensor:
        if self.embeddings is None:
            raise ModelError("expected a prior with its table: load_prior and for_table give one.")
        return self.embeddings

    def _ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The tokens of classes and of corners, (start, stop)."""
        return self.layout.class_range, self.layout.coordinate_range

    def _class_slots(self, v: Tensor) -> Tensor:
        return torch.arange(0, self._end(v), SLOTS_PER_OBJECT, device=v.device)

    def _corner_slots(self, v: Tensor) -> Tensor:
        slots = torch.arange(v.shape[1], device=v.device)
        return slots[(slots >= self._end(v)) | (slots % SLOTS_PER_OBJECT > 0)]

    def _end(self, v: Tensor) -> int:
        """Where the slots of the objects end."""
        return v.shape[1] - (CROP_SLOTS if self.layout.crop else 0)

    @property
    def dim(self) -> int:
        """D, of an embedding."""
        return self._attached().shape[1]

    def noised(self, v: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """v_t = a_t c v + s_t eps, what ``forward`` takes; v and eps [B, S, D], t as there."""
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
        """a_t and s_t, [B, 1, 1] or [B, S, 1]."""
        t = t[:, None, None] if t.dim() == 1 else t[..., None]
        return self.schedule.a.to(like)[t], self.schedule.s.to(like)[t]

    def surprise(self, tokens: Tensor) -> Tensor:
        """How unusual layouts are: of each token, how badly the others foretell it, in nats.

            sum_s -log p(k_s | k_r, r != s)

        This is the prediction where slot s is nothing but noise and all others have none; no
        noise is drawn for it. The sum is the layout's negative pseudo-log-likelihood.

        Args:
            tokens: int64 [N, S]; -1 for a token that is not known, which counts for nothing.

        Returns:
            [N], in the prior's dtype.

        Raises:
            ModelError: tokens of another shape or dtype.
        """
        if tokens.dtype != torch.int64 or tokens.shape[1:] != (self.layout.n_slots,):
            raise ModelError(
                f"expected tokens int64 [N, {self.layout.n_slots}], got {tokens.dtype} "
                f"{list(tokens.shape)}."
            )
        n = len(tokens)
        known = tokens >= 0
        kinds = (self._class_slots(tokens), self._corner_slots(tokens))
        like = self.object_in.weight
        total = torch.zeros(n, dtype=like.dtype, device=like.device)
        sizes = [stop - start + 1 for start, stop in self._ranges()]
        at = self.positions(tokens)
        # What is known is certain, what is hidden can be anything.
        certain = [
            torch.where(
                known[:, slots, None],
                F.one_hot(place.clamp_min(0), size).to(like),
                torch.full((size,), 1 / size).to(like),
            )
            for slots, place, size in zip(kinds, at, sizes, strict=True)
        ]
        for kind, slots in enumerate(kinds):
            m = len(slots)
            # One layout for every slot of this kind, with that slot hidden.
            parts = [each[:, None].repeat(1, m, 1, 1) for each in certain]
            own = torch.arange(m, device=like.device)
            parts[kind][:, own, own] = 1 / sizes[kind]
            classes, corners = (part.flatten(0, 1) for part in parts)
            of_slots = self._context(classes, self._sides(corners))[kind]
            mine = of_slots.unflatten(0, (n, m))[:, own, own]
            logs = (mine if kind == 0 else self._corners(mine)).log_softmax(dim=2)
            picked = logs.gather(2, at[kind].clamp_min(0)[..., None])[..., 0]
            total -= torch.where(known[:, slots], picked, 0.0).sum(dim=1)
        return total

    def _check(self, v: Tensor, timesteps: Tensor, noises: Tensor) -> None:
        crop = CROP_SLOTS if self.layout.crop else 0
        dim = self.dim
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
    config, scale = directory / "config.json", prior.config.scale
    if not (is_number(scale) and scale > 0):
        raise ModelError(f"expected a positive scale in {config}, got {scale!r}.")
    if not fits(prior, layout, table):
        raise ModelError(
            f"{directory} holds a prior of another model: expected the layouts and the token table "
            "of this one (dive-fast train-prior makes one)."
        )
    prior.embeddings = table.detach().float().cpu()
    return prior


def fits(prior: LayoutPrior, layout: LayoutFormat, table: Tensor) -> bool:
    """Whether a prior is over these layouts in the embeddings of this table."""
    return prior.config.layout == layout.to_dict() and prior.config.table == table_digest(table)
