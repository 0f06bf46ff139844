"""What callers give, brought into shape or refused in one sentence."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dive_fast.core.head import Head
from dive_fast.core.numbers import whole
from dive_fast.core.probes import ProbeList, check_count
from dive_fast.errors import DiveFastError, ImageError, shown
from dive_fast.models.layers import find_layer
from dive_fast.models.protocol import Model

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_prior(prior: Any, classes: int) -> torch.Tensor | None:
    """log p(y), float64 [C], of weights that need not sum to 1; None if they are uniform.

    Raises:
        DiveFastError: they are no C finite numbers of at least 0, or all 0.
    """
    if prior is None:
        return None
    expected = f"prior must hold {classes} weights, finite and at least 0"
    p = _numbers(prior)
    if p is None or p.dtype == torch.bool or p.is_complex():
        raise DiveFastError(f"{expected}, got {_what(prior)}.")
    if list(p.shape) != [classes]:
        raise DiveFastError(f"{expected}, got shape {list(p.shape)}.")
    p = p.detach().double().cpu()
    if not bool((p.isfinite() & (p >= 0)).all()):
        raise DiveFastError(f"{expected}, got {p[~(p.isfinite() & (p >= 0))][0].item():.4g}.")
    if not p.any():
        raise DiveFastError(f"{expected} and one above 0, got zeros only.")
    # By the largest first: a sum of large weights may be infinite.
    p = p / p.max()
    return (p / p.sum()).log()


def as_rows(classes: Any, count: int) -> torch.Tensor:
    """Classes as int64 [n], rows of the vocabulary; one number is a list of it.

    Raises:
        DiveFastError: they are no whole numbers in [0, count), or there are none.
    """
    given = _numbers(classes)
    whole_numbers = given is not None and not (
        given.is_floating_point() or given.is_complex() or given.dtype == torch.bool
    )
    if not whole_numbers or given.ndim > 1 or given.numel() == 0:
        raise DiveFastError(f"classes must be whole numbers [N] with N >= 1, got {_what(classes)}.")
    rows = given.reshape(-1).cpu().long()
    if int(rows.min()) < 0 or int(rows.max()) >= count:
        raise DiveFastError(f"classes must lie in [0, {count}), got {shown(rows.tolist())}.")
    return rows


def as_latents(latents: Any, shape: Sequence[int], batch: bool = True) -> torch.Tensor:
    """Images in model space: float [B, C, h, w], or [C, h, w] of one.

    Raises:
        ImageError: they are no floats, of another shape, or not finite.
    """
    first = ["B"] if batch else []
    expected = f"latents must have shape [{', '.join(map(str, [*first, *shape]))}]"
    given = _numbers(latents)
    if given is None:
        raise ImageError(f"{expected}, got {_what(latents)}.")
    if given.dtype not in _FLOATS:
        dtype = str(given.dtype).removeprefix("torch.")
        raise ImageError(f"latents must be floats of the model's scale, got {dtype}.")
    own = given.shape[1:] if batch else given.shape
    if given.ndim != len(shape) + batch or tuple(own) != tuple(shape):
        raise ImageError(f"{expected}, got {list(given.shape)}.")
    if not torch.isfinite(given).all():
        raise ImageError("latents must be finite, got NaN or infinity.")
    return given


def as_pairs(name: str, given: Any) -> Iterator[tuple[Any, Any]]:
    """(key, image) pairs of a stream, one by one.

    Raises:
        DiveFastError: it is no iterable of pairs, or a key cannot be one.
    """
    expected = f"expected {name} as pairs of a key and an image"
    if isinstance(given, str | torch.Tensor) or not isinstance(given, Iterable):
        raise DiveFastError(f"{expected}, got {_what(given)}.")
    for pair in given:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DiveFastError(f"{expected}, got {_what(pair)}.")
        if not isinstance(pair[0], Hashable):
            raise DiveFastError(f"{expected}, got a {type(pair[0]).__name__} as key.")
        yield pair[0], pair[1]


def as_probes(probes: Any) -> int | ProbeList | None:
    """How many, a list, or None.

    Raises:
        DiveFastError: something else, or a number out of range.
    """
    return probes if probes is None or isinstance(probes, ProbeList) else check_count(probes)


def as_head(head: Any, strategy: Any, model: Model) -> Head | None:
    """The learned head that a strategy shall use: given, or in a file.

    Raises:
        DiveFastError: it is none or for another model, or the strategy has no use for it.
        ModelError: its file cannot be used.
    """
    if head is None:
        return None
    if not getattr(strategy, "uses_head", False):
        raise DiveFastError(f"strategy {strategy.name!r} does not use a head: leave it out.")
    head = Head.load(head) if isinstance(head, str | os.PathLike) else head
    check_head(head, model)
    return head


def check_head(head: Any, model: Model) -> None:
    """That a head was learned for a model's classes, and reads what the model has.

    Raises:
        DiveFastError: it is none, or was not.
    """
    if not isinstance(head, Head):
        raise DiveFastError(f"expected a head, got {_what(head)}.")
    if not head.fits(model.vocabulary):
        raise DiveFastError(f"the head was learned for other classes than those of {model.name}.")
    if head.timestep >= len(model.schedule):
        raise DiveFastError(
            f"the head reads timestep {head.timestep}, but {model.name} has {len(model.schedule)}."
        )
    find_layer(model, head.layer)


def as_progress(progress: Any) -> int | None:
    """The number of images of a stream if a bar shall be shown.

    Raises:
        DiveFastError: something else.
    """
    return None if progress is None else whole("progress", progress, 0)


def is_finite(value: object) -> bool:
    """Whether it is a finite number, also one of numpy; True and texts are none."""
    if isinstance(value, bool | str | bytes):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _numbers(given: Any) -> torch.Tensor | None:
    """A dense tensor of it; None where there is none."""
    try:
        tensor = torch.as_tensor(given)
    # Whatever torch meets in texts, objects, ragged lists and numbers beyond its own.
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    return tensor if dense else None


def _what(given: Any) -> str:
    """Tensors by dtype and shape, the rest by value."""
    if isinstance(given, torch.Tensor):
        return f"a tensor of {str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
    return shown(given)
