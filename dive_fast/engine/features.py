"""What a block of the network makes of rows: caught on its way through, pooled over positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dive_fast.engine.model_checks import told
from dive_fast.errors import ModelError, shown
from dive_fast.models.layers import find_layer, image_part
from dive_fast.models.protocol import Model, optional


class _Answered(BaseException):
    """Ends the forward behind the block; no error, so that no code of a network handles it."""


def activations(
    model: Model,
    network: Callable[..., Any],
    layer: str | int,
    x_t: torch.Tensor,
    t: torch.Tensor,
    condition: torch.Tensor,
) -> torch.Tensor:
    """The image's activations behind a block, the first time that it runs.

    Args:
        network: ``model.predict``, as the engine runs it.
        layer: see ``models.layers.find_layer``.
        x_t, t, condition: as ``Model.predict`` takes them, M rows.

    Returns:
        float32 on the device: feature maps [M, D, h, w], or [M, N, D] of N tokens.

    Raises:
        DiveFastError: there is no such layer.
        ModelError: the network does not run it, or it gives something else.
    """
    name, module = find_layer(model, layer)
    caught: list[Any] = []

    def catch(module: nn.Module, arguments: Any, output: Any) -> None:
        caught.append(image_part(module, output))
        raise _Answered

    handle = module.register_forward_hook(catch)
    try:
        told(model, "predict", network, x_t, t, condition)
    except _Answered:
        pass
    finally:
        handle.remove()
    if not caught:
        raise ModelError(f"expected a layer that {model.name} runs, got {name}, which it does not.")
    found = caught[0]
    if (image_tokens := optional(model, "image_tokens")) is not None:
        found = told(model, "image_tokens", image_tokens, name, found, condition)
    _check(model, name, found, len(x_t))
    return found.float()


def pooled(found: torch.Tensor, pool: str | None) -> torch.Tensor:
    """Activations z_i over their positions i: [M, D, h, w] or [M, N, D] to [M, D].

    mean:       m = mean_i z_i
    attention:  sum_i softmax_i(z_i . m / sqrt(D)) z_i

    None leaves them as they are.
    """
    if pool is None:
        return found
    tokens = found.flatten(2).mT if found.ndim == 4 else found
    mean = tokens.mean(dim=1)
    if pool == "mean":
        return mean
    similarity = (tokens @ mean[:, :, None]) / tokens.shape[2] ** 0.5
    return (similarity.softmax(dim=1) * tokens).sum(dim=1)


def _check(model: Model, name: str, found: Any, rows: int) -> None:
    """That a layer has given activations at positions, row by row."""
    if not isinstance(found, torch.Tensor):
        got = shown(type(found).__name__)
    elif not found.is_floating_point() or found.ndim not in (3, 4) or len(found) != rows:
        got = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    else:
        return
    raise ModelError(
        f"expected {name} of {model.name} to give floats [{rows}, D, h, w] or [{rows}, tokens, D], "
        f"got {got}."
    )
