"""How many rows a forward takes where the user does not say."""

from __future__ import annotations

from dive_fast.core.numbers import whole
from dive_fast.models.protocol import Model, optional

DEFAULT_ROWS = 256
# Rows x parameters on the CPU: 8 rows of SD 1.5 (860 M), 256 of networks up to 33 M.
ROW_PARAMETERS = 1 << 33


def rows_per_batch(model: Model, batch_size: int | None = None) -> int:
    """The batch size that was asked for, or the model's default.

    The default is 256 rows; on the CPU as many fewer, by powers of two down to 1, as keep rows x
    parameters of ``model.network`` within 2^33. What a row's activations take grows with the
    network, and a CPU that runs out of memory begins to swap; other devices say so, and the engine
    halves the batch. A model without ``network`` has 256.

    Args:
        batch_size: rows per forward at most, at least 1; it wins where it is given.

    Raises:
        DiveFastError: a batch size that is no whole number, or below 1.
    """
    if batch_size is not None:
        return whole("batch_size", batch_size, 1)
    rows, network = DEFAULT_ROWS, optional(model, "network")
    if network is None or model.device.type != "cpu":
        return rows
    parameters = sum(parameter.numel() for parameter in network.parameters())
    while rows > 1 and rows * parameters > ROW_PARAMETERS:
        rows //= 2
    return rows
