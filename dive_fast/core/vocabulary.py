"""The discrete vocabulary that a relaxed condition is projected onto."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from dive_fast import ops
from dive_fast.core.projection import DiscreteProjection
from dive_fast.errors import DiveFastError, ModelError

# Of a table in float32, 1 GiB. Where it would be larger, one that comes in half precision stays so.
FLOAT32_BYTES = 1 << 30
BLOCK_BYTES = 1 << 25  # of the rows that are computed with at a time, in float32
HALF = (torch.float16, torch.bfloat16)


def is_large(n_rows: int, dim: int) -> bool:
    """Whether a table of so many rows is stored in half precision if it comes so."""
    return n_rows * dim * torch.float32.itemsize > FLOAT32_BYTES


def float_blocks(
    table: torch.Tensor, minus: torch.Tensor | float | None = None
) -> Iterator[torch.Tensor]:
    """The rows of a table in float32, ``BLOCK_BYTES`` at a time.

    A block holds until the next one is asked for: all are made in the same memory, as an allocator
    that has to find room for so many at once may not find it in what was given back.

    Args:
        minus: [D] or a number, what is subtracted from every row.
    """
    n = max(1, BLOCK_BYTES // (torch.float32.itemsize * table.shape[1]))
    if table.dtype == torch.float32 and minus is None:
        yield from table.split(n)
        return
    memory = torch.empty(min(n, len(table)), table.shape[1])
    for block in table.split(n):
        made = memory[: len(block)]
        made.copy_(block)
        yield made if minus is None else made.sub_(minus)


class Vocabulary:
    """One row per answer: the embeddings that the network was trained with.

    Attributes:
        table: [V, D] on the CPU; row c is the embedding of answer c. float32, or float16 or
            bfloat16 if it came so and ``is_large``: compute with ``rows``, ``linear`` ..., which
            are float32 in every case.
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
        half = table.dtype in HALF and is_large(*table.shape)
        self.table = table.detach().to("cpu", table.dtype if half else torch.float32).contiguous()
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

    def rows(self, index: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """The embeddings of answers int64 [N], float32 [N, D]."""
        return self.table[index].float()

    def mean(self) -> torch.Tensor:
        """The neutral embedding v0, float32 [D]: the mean of the answers' rows."""
        if self.table.dtype == torch.float32:
            return self.table.mean(dim=0)
        total = torch.zeros(self.dim)
        for block in float_blocks(self.table):
            total += block.sum(dim=0)
        return total / len(self)

    def spread(self) -> tuple[float, float]:
        """Scalar mean and standard deviation of all entries, the unconditional row included."""
        extra = [] if self.unconditional is None else [self.unconditional[None]]
        if self.table.dtype == torch.float32 and self.table.nbytes <= BLOCK_BYTES:
            entries = torch.cat([self.table, *extra])
            return entries.mean().item(), entries.std().item()
        tables = [self.table, *extra]
        n = sum(part.numel() for part in tables)
        sums = [b.sum(dim=1).double().sum() for part in tables for b in float_blocks(part)]
        mean = sum(sums).item() / n
        # The blocks are our own where something is subtracted.
        squares = [
            block.square_().sum(dim=1).double().sum()
            for part in tables
            for block in float_blocks(part, mean)
        ]
        return mean, math.sqrt(sum(squares).item() / (n - 1))

    def linear(self, v0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """g . (v_c - v0) of every answer c, float32 [V], for a gradient g [D]."""
        return torch.cat([block @ gradient for block in float_blocks(self.table, v0)])

    def distances(self, v: torch.Tensor) -> torch.Tensor:
        """| v_c - v | of every answer c, float32 [V]."""
        return torch.cat([block.norm(dim=1) for block in float_blocks(self.table, v)])

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
        if self.table.dtype != torch.float32:
            return self._nearest_by_block(v.detach().float(), metric)
        if metric not in self._projections:
            self._projections[metric] = DiscreteProjection.single(self.table, metric)
        return self._projections[metric].index(v.detach()[:, None])[:, 0]

    def _nearest_by_block(self, v: torch.Tensor, metric: str) -> torch.Tensor:
        """``nearest`` of a table that is not in float32."""
        best = torch.full((len(v),), math.inf)
        index, start = torch.zeros(len(v), dtype=torch.int64), 0
        for block in float_blocks(self.table):
            found, distance = ops.nearest_row(v, block, metric=metric)
            nearer = distance < best
            index[nearer], best[nearer] = found[nearer] + start, distance[nearer]
            start += len(block)
        return index
