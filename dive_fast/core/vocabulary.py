"""The discrete vocabulary that a relaxed condition is projected onto."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dive_fast.core.projection import DiscreteProjection
from dive_fast.errors import DiveFastError, ModelError


class Vocabulary:
    """One row per answer: the embeddings that the network was trained with.

    Attributes:
        table: float32 [V, D] on the CPU; row c is the embedding of answer c.
        names: one name per row.
        unconditional: float32 [D], the embedding of "no condition", once for each of the ``parts``;
            or None.
        shape: of one row, so that ``table.view(V, *shape)`` shows its parts: (D,) unless said,
            (L, width) for a prompt of L tokens.
        parts: how many conditions of the network a row holds end to end. The loss of an answer is
            the mean of theirs (see ``averaging``); 1 unless said.
    """

    def __init__(
        self,
        table: torch.Tensor,
        names: Sequence[str],
        unconditional: torch.Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        parts: int = 1,
    ) -> None:
        if table.ndim != 2 or len(table) == 0:
            raise ModelError(f"a vocabulary needs a table [V, D], got {list(table.shape)}.")
        if len(names) != len(table):
            raise ModelError(
                f"a vocabulary of {len(table)} rows needs as many names, got {len(names)}."
            )
        dim = table.shape[1]
        if shape is not None and math.prod(shape) != dim:
            raise ModelError(f"a row of {dim} values cannot have the shape {list(shape)}.")
        if parts < 1 or dim % parts:
            raise ModelError(f"a row of {dim} values cannot have {parts} equal parts.")
        self.shape = (dim,) if shape is None else tuple(shape)
        self.parts = parts
        self.table = table.detach().float().cpu().contiguous()
        self.names = tuple(names)
        self._projections: dict[str, DiscreteProjection] = {}
        self.unconditional = None
        if unconditional is not None:
            self.unconditional = unconditional.detach().float().cpu()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def dim(self) -> int:
        return self.table.shape[1]

    def mean(self) -> torch.Tensor:
        """The neutral embedding v0 [D]: the mean of the answers' rows."""
        return self.table.mean(dim=0)

    def spread(self) -> tuple[float, float]:
        """Scalar mean and standard deviation of all entries, the unconditional row included."""
        rows = [self.table]
        if self.unconditional is not None:
            rows.append(self.unconditional[None])
        entries = torch.cat(rows)
        return entries.mean().item(), entries.std().item()

    def nearest(self, v: torch.Tensor, metric: str = "l2") -> torch.Tensor:
        """The nearest row of each embedding v [N, D], as int64 [N]; ties go to the lowest index.

        Args:
            v: float [N, D].
            metric: "l2" (Euclidean) or "cosine".

        Raises:
            DiveFastError: another metric, or v of another width.
        """
        if v.ndim != 2 or v.shape[1] != self.dim:
            raise DiveFastError(f"v must have shape [N, {self.dim}], got {list(v.shape)}.")
        if metric not in self._projections:
            self._projections[metric] = DiscreteProjection.single(self.table, metric)
        return self._projections[metric].index(v.detach()[:, None])[:, 0]
