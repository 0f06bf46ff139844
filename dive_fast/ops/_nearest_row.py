"""`nearest_row`: the nearest row of a table for every query, and `projection` onto it."""

from __future__ import annotations

import torch
from torch import Tensor

from dive_fast.errors import DiveFastError
from dive_fast.ops._checks import (
    FLOAT_DTYPES,
    accumulation_dtype,
    check_choice,
    check_code,
    check_index,
    check_index_range,
    check_matrix,
    check_no_gradient,
    check_same_device,
)
from dive_fast.ops._library import define

# Positions are the codes of the op schema and of csrc/cpu/kernels.h.
METRICS = ("l2", "cosine")
L2, COSINE = range(2)


def _keys(v: Tensor, table: Tensor, metric: int) -> Tensor:
    """What orders the rows for each query, [N, V], lower for nearer; infinite where no number is.

    Distances, or the cosine without |v|, which is common to all rows. NaN, which is no distance,
    and what is too large for the sum are infinitely far.
    """
    dtype = accumulation_dtype(v.dtype)
    v, table = v.to(dtype), table.to(dtype)
    if metric == L2:
        # The form with a matrix product cancels digits when rows lie close together.
        keys = torch.cdist(v, table, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        lengths = table.double().norm(dim=1)
        dots = (v @ table.T).double()
        keys = torch.where(lengths == 0, 0 * dots, -dots / lengths)
        keys = torch.where(lengths.isfinite(), keys, torch.inf)
    return torch.where(keys.isfinite(), keys, torch.inf)


def _allowed_mask(
    queries: int, rows: int, allowed: Tensor | None, extra: Tensor | None, device: torch.device
) -> Tensor:
    """Which rows a query may take, bool [N, V]."""
    row = torch.arange(rows, device=device)
    if allowed is None:
        mask = torch.ones(queries, rows, dtype=torch.bool, device=device)
    else:
        mask = (row >= allowed[:, :1]) & (row < allowed[:, 1:])
    if extra is not None:
        mask[:, extra] = True
    return mask


def _check_values(rows: int, allowed: Tensor | None, extra: Tensor | None) -> None:
    """The checks that read values; CPU only, elsewhere they would stall the device."""
    if extra is not None:
        check_index_range("nearest_row", "extra", extra, rows)
    if allowed is None or allowed.device.type != "cpu":
        return
    start, stop = allowed.unbind(1)
    for wrong, error, complaint, rest in (
        ((start < 0) | (start > stop) | (stop > rows), IndexError, f"be ranges within [0, {rows}]",
         ""),
        ((start == stop) & (extra is None or extra.numel() == 0), DiveFastError,
         "leave every query a row", " and no extra rows"),
    ):  # fmt: skip
        if wrong.any():
            n = int(wrong.nonzero()[0])
            raise error(
                f"nearest_row: allowed must {complaint}, but got "
                f"[{int(start[n])}, {int(stop[n])}) at position {n}{rest}"
            )


def _reference(
    v: Tensor, table: Tensor, allowed: Tensor | None, extra: Tensor | None, metric: int
) -> tuple[Tensor, Tensor]:
    check_code("nearest_row", "metric", metric, METRICS)
    rows = table.shape[0]
    _check_values(rows, allowed, extra)
    if v.shape[0] == 0:
        return v.new_empty(0, dtype=torch.int64), v.new_empty(0, dtype=accumulation_dtype(v.dtype))
    keys = _keys(v, table, metric)
    mask = _allowed_mask(v.shape[0], rows, allowed, extra, v.device)
    best = keys.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    index = (mask & (keys == best)).to(torch.uint8).argmax(dim=1)  # the first of equal ones
    return index, _distance_of_pairs(v, table[index], metric)


def _distance_of_pairs(v: Tensor, rows: Tensor, metric: int) -> Tensor:
    """The distance of v[n] to rows[n], [N], computed in fp64."""
    q, r = v.double(), rows.double()
    if metric == L2:
        distance = (q - r).norm(dim=1)
    else:
        lengths = q.norm(dim=1) * r.norm(dim=1)
        distance = 1 - torch.where(lengths == 0, 0, (q * r).sum(dim=1) / lengths)
    return distance.to(accumulation_dtype(v.dtype))


def _fake(
    v: Tensor, table: Tensor, allowed: Tensor | None, extra: Tensor | None, metric: int
) -> tuple[Tensor, Tensor]:
    check_code("nearest_row", "metric", metric, METRICS)
    n = v.shape[0]
    distance = v.new_empty(n, dtype=accumulation_dtype(v.dtype))
    return v.new_empty(n, dtype=torch.int64), distance


define(
    "nearest_row(Tensor v, Tensor table, Tensor? allowed, Tensor? extra, int metric) "
    "-> (Tensor, Tensor)",
    _reference,
    _fake,
)


def nearest_row(
    v: Tensor,
    table: Tensor,
    *,
    allowed: Tensor | None = None,
    extra: Tensor | None = None,
    metric: str = "l2",
) -> tuple[Tensor, Tensor]:
    """The nearest allowed row of a table for every query, without ever holding N x V distances.

    `index[n] = argmin over allowed r of distance(v[n], table[r])`; among equally near rows the
    lowest index. Distances are summed from differences in fp32 (fp64 for fp64), so rows that lie
    close together keep their digits; only rows nearer to each other than that rounding may be
    swapped. A row at a NaN distance, or at one too large for that sum, is taken for infinitely far;
    where all are, the lowest allowed row is the answer, and its distance says so.

    Args:
        v: queries, [N, D]; fp64, fp32, bf16 or fp16; any strides.
        table: rows, [V, D], of the dtype of `v`, V at least 1; any strides.
        allowed: the rows `start <= r < stop` that each query may take, int64 [N, 2]; None for all.
        extra: rows that every query may take besides, int64 [E], such as "none"; or None.
        metric: "l2" (Euclidean) or "cosine" (1 - cosine similarity, 1 for a vector of zeros).

    Returns:
        index, int64 [N], and distance, [N], fp32 (fp64 for fp64 data). Neither has a gradient;
        `projection` passes one straight through.

    Raises:
        DiveFastError: an argument has the wrong shape, dtype, device or name or requires a
            gradient, or (CPU only) a query is allowed no row at all.
        IndexError: (CPU only) `allowed` or `extra` leaves the table.

    Examples:
        >>> import torch
        >>> from dive_fast.ops import nearest_row
        >>> table = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]])
        >>> nearest_row(torch.tensor([[2.0, 4.0], [0.0, 0.0]]), table)
        (tensor([1, 0]), tensor([1., 0.]))
        >>> nearest_row(torch.zeros(1, 2), table, allowed=torch.tensor([[1, 3]]))[0]
        tensor([1])
    """
    arguments = (v, table, allowed, extra)
    code = _check("nearest_row", *arguments, metric)
    check_no_gradient("nearest_row", v=v, table=table)
    index, distance = torch.ops.dive_fast.nearest_row(*arguments, code)
    return index, distance


def projection(
    v: Tensor,
    table: Tensor,
    *,
    allowed: Tensor | None = None,
    extra: Tensor | None = None,
    metric: str = "l2",
) -> tuple[Tensor, Tensor]:
    """Projects queries on the rows of a table, with a straight-through gradient.

    `P(v)[n] = table[nearest_row(v)[n]]`, and backward dP/dv = 1 (the estimator of Bengio et al.,
    arXiv 1308.3432, as DIVE, arXiv 2504.17253, uses it). The rows are returned exactly, not to
    rounding as the usual `v + (row - v).detach()` does, if `v` is finite.

    Args: as `nearest_row`; `v` may require a gradient, `table` may not.

    Returns:
        the rows, [N, D], differentiable in `v`, and their index, int64 [N].

    It raises what `nearest_row` does.

    Examples:
        >>> import torch
        >>> from dive_fast.ops import projection
        >>> v = torch.tensor([[0.9]], requires_grad=True)
        >>> row, index = projection(v, torch.tensor([[0.0], [1.0]]))
        >>> (3 * row).sum().backward()
        >>> row.item(), index.item(), v.grad.item()
        (1.0, 1, 3.0)
    """
    code = _check("projection", v, table, allowed, extra, metric)
    check_no_gradient("projection", table=table)
    index, _ = torch.ops.dive_fast.nearest_row(v.detach(), table, allowed, extra, code)
    return table[index] + (v - v.detach()), index


def _check(
    op: str, v: Tensor, table: Tensor, allowed: Tensor | None, extra: Tensor | None, metric: str
) -> int:
    """Checks every argument; returns the code of `metric`."""
    check_matrix(op, "v", v, FLOAT_DTYPES, "[N, D]")
    check_matrix(op, "table", table, (v.dtype,), "[V, D]")
    if table.shape[0] < 1 or table.shape[1] != v.shape[1]:
        raise DiveFastError(
            f"{op}: table must have shape [V, {v.shape[1]}] with V at least 1, "
            f"but got {list(table.shape)}"
        )
    if allowed is not None:
        check_matrix(op, "allowed", allowed, (torch.int64,), f"[{v.shape[0]}, 2]")
        if tuple(allowed.shape) != (v.shape[0], 2):
            raise DiveFastError(
                f"{op}: allowed must have shape [{v.shape[0]}, 2], but got {list(allowed.shape)}"
            )
    if extra is not None:
        check_index(op, "extra", extra)
    check_same_device(op, "v", v, table=table, allowed=allowed, extra=extra)
    return check_choice(op, "metric", metric, METRICS)
