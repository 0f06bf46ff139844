"""Networks in memory without their weights, in the precision that these shall have."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def weights_elsewhere() -> Iterator[None]:
    """Parameters are made on the meta device; buffers, which are computed, where they belong."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        handle.remove()


def with_memory(model: nn.Module, dtype: torch.dtype, keep: Collection[str] = ()) -> nn.Module:
    """The parameters in memory, unfilled; tied ones stay one.

    Args:
        dtype: of the parameters that are floats.
        keep: modules whose parameters stay as they were made, see ``is_kept``.
    """
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                half = parameter.is_floating_point() and not is_kept(f"{prefix}.{name}", keep)
                empty = torch.empty(
                    parameter.shape, dtype=dtype if half else parameter.dtype, device="cpu"
                )
                made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
    return model


def is_kept(name: str, keep: Collection[str]) -> bool:
    """Whether a weight lies in one of the modules: "wo", or "norm1.emb", at whatever depth."""
    return any(f".{module}." in f".{name}." for module in keep)
