"""A diffusion prior over the token embeddings of layouts.

    v_t = a_t c v + s_t eps
    l(v; t, eps) = || eps - eps_phi(v_t, t) ||^2 / dim

with c the scalar that gives the embeddings unit variance. Source: DIVE (arXiv 2504.17253).

An embedding is a row of a frozen table, so the best guess of the noise is known up to what the
other tokens say: with p over the tokens k that the slot can hold,

    log p(k | v_t) = <a_t c e_k, v_t> / s_t^2 - |a_t c e_k|^2 / (2 s_t^2) + f_phi(v_t, t)_k + const
    eps_phi(v_t, t) = (v_t - a_t c sum_k p(k | v_t) e_k) / s_t

and only f, what the other tokens say, is left to learn. The same form for words: continuous
diffusion for categorical data (arXiv 2211.15089). Every slot may have a noise of its own (diffusion
forcing, arXiv 2407.01392); how much it has shows in the p of its token alone, which is what the
network reads, so it is told no timestep.

Objects have no order: the three tokens of an object are one element of a set, and the
transformer sees the elements without positions.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.errors import ModelError
from dive_fast.priors.slots import CORNERS, SlotKinds

FEED_FORWARD = 4  # times the width


class LayoutPrior(ModelMixin, ConfigMixin):
    """Predicts the noise in the token embeddings of a layout.

    ``for_table`` and ``load_prior`` give it the table; without one it only holds weights.

    Attributes:
        embeddings: [V, D], of the tokens, or None.
        kinds: which slots hold classes and which corners.

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
        self.layout_format = LayoutFormat.from_dict(layout)
        self.kinds = SlotKinds(self.layout_format)
        self.schedule = Schedule.from_betas(make_betas("linear", num_train_timesteps))
        # Not stored: it is the model's.
        self.register_buffer("embeddings", None, persistent=False)
        n_classes, n_sides = len(self.layout_format.names) + 1, 2 * self.layout_format.grid + 1
        self.object_in = nn.Linear(n_classes + 2 * n_sides, width)
        self.object_out = nn.Linear(width, n_classes + 2 * n_sides)
        if self.layout_format.crop:
            self.crop_in = nn.Linear(self.layout_format.crop_slots * n_sides, width)
            self.crop_out = nn.Linear(width, self.layout_format.crop_slots * n_sides)
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
        for linear in (self.object_out, *([self.crop_out] if self.layout_format.crop else [])):
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
        prior.attach(table)
        return prior

    def attach(self, table: Tensor) -> None:
        """Takes the table [V, D] whose embeddings it learned; nothing is checked."""
        self.embeddings = table.detach().float().cpu()

    def forward(self, v_t: Tensor, t: Tensor) -> Tensor:
        """The noise in noised embeddings.

        Args:
            v_t: [B, S, D], of unit variance.
            t: int64 [B], or [B, S] for noises that differ from slot to slot.

        Returns:
            [B, S, D].
        """
        a, s = self._factors(t, v_t)
        mean = torch.empty_like(v_t)
        for slots, log_p, rows in zip(
            self.kinds.slots(v_t), self.log_posteriors(v_t, t), self._rows(v_t), strict=True
        ):
            mean[:, slots] = log_p.exp() @ rows
        return (v_t - a * mean) / s

    def log_posteriors(self, v_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log p(k | v_t), of the slots for classes and of those for corners, in their order.

        Args:
            v_t, t: as for ``forward``.

        Returns:
            [B, n, C + 1] and [B, 2 n (+ 2 with a crop), G G + 1]; the last token is none.
        """
        own_classes, own_corners = self._own_logits(v_t, t)
        classes, corners = own_classes.softmax(dim=2), own_corners.softmax(dim=2)
        sides = self.kinds.side_probabilities(corners)
        class_context, side_context = self._context(classes, sides)
        corner_context = self.kinds.corner_logits(side_context)
        return (
            (own_classes + class_context).log_softmax(dim=2),
            (own_corners + corner_context).log_softmax(dim=2),
        )

    def positions(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens [B, S] stand in what ``log_posteriors`` returns, int64."""
        return self.kinds.positions(tokens)

    def _own_logits(self, v_t: Tensor, t: Tensor) -> list[Tensor]:
        """<a_t c e_k, v_t> / s_t^2 - |a_t c e_k|^2 / (2 s_t^2): what a slot says of its token."""
        a, s = (each.expand(-1, v_t.shape[1], -1) for each in self._factors(t, v_t))
        found = []
        for slots, rows in zip(self.kinds.slots(v_t), self._rows(v_t), strict=True):
            inner = v_t[:, slots] @ rows.t() - a[:, slots] / 2 * rows.square().sum(dim=1)
            found.append(a[:, slots] / s[:, slots].square() * inner)
        return found

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
        if self.layout_format.crop:
            h = torch.cat([h, self.crop_in(sides[:, 2 * n :].flatten(1))[:, None]], dim=1)
        h = self.blocks(h)
        out = self.object_out(h[:, :n])
        class_logits, side_logits = out.split([classes.shape[2], 2 * n_sides], dim=2)
        side_logits = side_logits.unflatten(2, (2, n_sides)).flatten(1, 2)
        if self.layout_format.crop:
            crop_logits = self.crop_out(h[:, n]).unflatten(
                1, (self.layout_format.crop_slots, n_sides)
            )
            side_logits = torch.cat([side_logits, crop_logits], dim=1)
        return class_logits, side_logits

    def _rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """c times the embeddings that slots for classes and for corners can hold, none last."""
        return self.kinds.rows(self.config.scale * self._attached().to(like))

    def _attached(self) -> Tensor:
        if self.embeddings is None:
            raise ModelError("expected a prior with its table: load_prior and for_table give one.")
        return self.embeddings

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
        if tokens.dtype != torch.int64 or tokens.shape[1:] != (self.layout_format.n_slots,):
            raise ModelError(
                f"expected tokens int64 [N, {self.layout_format.n_slots}], got {tokens.dtype} "
                f"{list(tokens.shape)}."
            )
        known, positions = tokens >= 0, self.positions(tokens)
        beliefs = self._beliefs(tokens)
        total = beliefs[0].new_zeros(len(tokens))
        for kind, slots in enumerate(self.kinds.slots(tokens)):
            log_p = self._foretold(beliefs, kind)
            log_p = log_p.gather(2, positions[kind].clamp_min(0)[..., None])[..., 0]
            total -= torch.where(known[:, slots], log_p, 0.0).sum(dim=1)
        return total

    def _beliefs(self, tokens: Tensor) -> list[Tensor]:
        """Probabilities of each kind's tokens: a known one is certain, else it can be any."""
        like, found = self.object_in.weight, []
        kinds = self.kinds.slots(tokens), self.positions(tokens), self.kinds.sizes
        for slots, positions, size in zip(*kinds, strict=True):
            certain = F.one_hot(positions.clamp_min(0), size).to(like)
            anything = torch.full((size,), 1 / size).to(like)
            found.append(torch.where(tokens[:, slots, None] >= 0, certain, anything))
        return found

    def _foretold(self, beliefs: list[Tensor], kind: int) -> Tensor:
        """log p of every slot of a kind from all other slots, [N, n, C + 1 or G G + 1]."""
        n_layouts, n_slots, size = beliefs[kind].shape
        # Every layout once for each of these slots, with that slot hidden.
        classes, corners = copies = [p[:, None].repeat(1, n_slots, 1, 1) for p in beliefs]
        hidden = torch.arange(n_slots, device=beliefs[kind].device)
        copies[kind][:, hidden, hidden] = 1 / size
        sides = self.kinds.side_probabilities(corners.flatten(0, 1))
        logits = self._context(classes.flatten(0, 1), sides)[kind]
        logits = logits.unflatten(0, (n_layouts, n_slots))[:, hidden, hidden]
        if kind == CORNERS:
            logits = self.kinds.corner_logits(logits)
        return logits.log_softmax(dim=2)

    def _check(self, v: Tensor, timesteps: Tensor, noises: Tensor) -> None:
        crop, dim = self.layout_format.crop_slots, self.dim
        good = v.dim() == 3 and v.shape[2] == dim and v.shape[1] > crop
        if not good or (v.shape[1] - crop) % SLOTS_PER_OBJECT:
            extra = f" + {crop}" if crop else ""
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
