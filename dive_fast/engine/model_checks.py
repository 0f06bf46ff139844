"""What a model of one's own may get wrong: at the start, and at its first batch.

``models.protocol.Model`` is what is expected. What is told here would else end in an error of torch
that names neither the model nor what it did, or in a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from dive_fast import ops
from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.numbers import is_number, is_whole
from dive_fast.core.schedule import Schedule
from dive_fast.core.shortlist import Shortlist
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.engine.cache import is_out_of_memory
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.protocol import optional

_ATTRIBUTES = (
    "name", "schedule", "vocabulary", "latent_shape", "image_shape", "device", "dtype",
    "inverse_temperature",
)  # fmt: skip
_METHODS = ("identity", "encode", "predict")
_KINDS = {
    "name": (str, "a text"),
    "schedule": (Schedule, "a dive_fast.core.schedule.Schedule"),
    "vocabulary": (Vocabulary, "a dive_fast.core.vocabulary.Vocabulary"),
    "device": (torch.device, "a torch.device"),
    "dtype": (torch.dtype, "a torch.dtype"),
}
_OPTIONAL_KINDS = {
    "network": (nn.Module, "a torch.nn.Module"),
    "timesteps": (TimestepWeights, "a TimestepWeights"),
    "loss_weights": (LossWeights, "LossWeights"),
    "shortlist": (Shortlist, "a Shortlist"),
    "layout_format": (LayoutFormat, "a LayoutFormat"),
}
# The ops' dtypes, but fp64: the engine computes beside float32.
PREDICTIONS = (torch.float32, torch.bfloat16, torch.float16)


def check_model(model: Any) -> None:
    """That an object is a frozen model as ``models.protocol.Model`` says.

    Raises:
        ModelError: an attribute is missing or of another kind, or the network is being trained.
    """
    if isinstance(model, type):
        _fail(f"a model, got the class {model.__name__}")
    name = _name(model)
    for attribute in (*_ATTRIBUTES, *_METHODS):
        if not hasattr(model, attribute):
            _fail(f"a model with '{attribute}', got {name} without (see dive_fast.models.protocol)")
    for attribute, (kind, what) in _KINDS.items():
        value = getattr(model, attribute)
        if not isinstance(value, kind):
            _fail(f"'{attribute}' of {name} to be {what}, got {_got(value)}")
    for attribute, (kind, what) in _OPTIONAL_KINDS.items():
        value = optional(model, attribute)
        if value is not None and not isinstance(value, kind):
            _fail(f"'{attribute}' of {name} to be {what} or None, got {_got(value)}")
    for attribute in _METHODS:
        if not callable(getattr(model, attribute)):
            _fail(f"'{attribute}' of {name} to be a method, got {_got(getattr(model, attribute))}")
    for attribute in ("latent_shape", "image_shape"):
        value = getattr(model, attribute)
        ok = isinstance(value, Sequence) and len(value) == 3
        if not ok or not all(is_whole(size, 1) for size in value):
            _fail(f"'{attribute}' of {name} to be three sizes (C, h, w), got {_got(value)}")
    if model.image_shape[1] != model.image_shape[2]:
        _fail(f"'image_shape' of {name} to be square, got {_got(model.image_shape)}")
    if not model.dtype.is_floating_point:
        _fail(f"'dtype' of {name} to be one of floats, got {_got(model.dtype)}")
    if not isinstance(model.schedule.target, str) or model.schedule.target not in ops.TARGETS:
        _fail(
            f"the schedule of {name} to have a target of {', '.join(ops.TARGETS)}, got "
            f"{_got(model.schedule.target)}"
        )
    if (level := optional(model, "default_cache")) not in ("off", "exact", "encoder"):
        _fail(f"'default_cache' of {name} to be off, exact or encoder, got {_got(level)}")
    _check_device(model)
    beta = model.inverse_temperature
    if not is_number(beta) or beta <= 0:
        _fail(f"'inverse_temperature' of {name} to be a number above 0, got {_got(beta)}")
    for module in _modules(model):
        if module.training and _is_random(module):
            _fail(
                f"{name} to be frozen, got it in training mode, where {type(module).__name__} "
                "draws at random or depends on the batch: call eval() on its network"
            )


def _check_device(model: Any) -> None:
    """That something can be computed where the model says that it is."""
    try:
        torch.zeros(1, device=model.device).item()
    # torch asserts where it was built without the device, and raises whatever the driver says.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"expected the device of {_name(model)} to be one of this machine, got {model.device} "
            f"({reason.rstrip('.')})."
        ) from error


class FirstBatch:
    """Calls a model's parts, and looks at what each returns the first time.

    Args:
        model: that has passed ``check_model``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._seen: set[str] = set()

    def prediction(self, part: str, rows: int, got: Any) -> torch.Tensor:
        """The prediction of so many rows, by ``predict`` or ``decoder``.

        Raises:
            ModelError: it is no tensor, or of another shape, dtype or device than it must be.
        """
        if part not in self._seen:
            _check_prediction(self.model, part, rows, got)
            self._seen.add(part)
        return got

    def state(self, part: str, rows: int, got: Any) -> tuple[torch.Tensor, ...]:
        """The activations of so many rows, by another part.

        Raises:
            ModelError: they are no tuple of tensors with so many rows each.
        """
        if part not in self._seen:
            name, what = _name(self.model), f"a tuple of tensors with {rows} rows each"
            if not isinstance(got, tuple) or not got:
                _fail(f"'{part}' of {name} to return {what}, got {type(got).__name__}")
            for entry in got:
                if not isinstance(entry, torch.Tensor) or entry.ndim < 1 or len(entry) != rows:
                    _fail(f"'{part}' of {name} to return {what}, got {_got(entry)} in it")
            self._seen.add(part)
        return got


def checked(model: Any, part: str, *arguments: Any) -> torch.Tensor:
    """One prediction of a model, looked at: for callers without an engine.

    Raises:
        ModelError: as ``told`` and ``FirstBatch``.
    """
    got = told(model, part, getattr(model, part), *arguments)
    _check_prediction(model, part, len(arguments[0]), got)
    return got


def told(model: Any, part: str, function: Any, *arguments: Any) -> Any:
    """What a part of the model returns; its own errors in one sentence.

    Memory that runs out stays the error that it is: the engine knows what to do.

    Raises:
        ModelError: it failed.
    """
    try:
        return function(*arguments)
    except DiveFastError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"'{part}' of {_name(model)} failed with {type(error).__name__}: {reason}"
        ) from error


def gradient(model: Any, losses: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
    """d (sum of losses) / d conditions.

    Raises:
        ModelError: the model has cut it, or its backward failed.
    """
    found = None
    if losses.requires_grad:
        backward = partial(torch.autograd.grad, losses.sum(), conditions, allow_unused=True)
        (found,) = told(model, "backward", backward)
    if found is None:
        _fail(
            f"the prediction of {_name(model)} to be differentiable in the condition, got one that "
            "is cut off (by detach(), no_grad() or inference_mode())"
        )
    return found


def check_finite(model: Any, what: str, values: torch.Tensor) -> torch.Tensor:
    """Losses or gradients, on the CPU; what is no number would count as not measured.

    Raises:
        ModelError: one is none.
    """
    if not torch.isfinite(values).all():
        _fail(
            f"finite {what} from {_name(model)} in {model.dtype}, got NaN or infinity: its "
            "weights, its schedule or this precision cannot be right"
        )
    return values


def check_encoded(model: Any, got: Any, images: int) -> torch.Tensor:
    """x0 of so many images, float32 [B, C, h, w].

    Raises:
        ModelError: ``encode`` has returned something else.
    """
    expected = [images, *model.latent_shape]
    if not isinstance(got, torch.Tensor) or list(got.shape) != expected:
        _fail(f"'encode' of {_name(model)} to return x0 of shape {expected}, got {_got(got)}")
    if not got.is_floating_point():
        _fail(f"'encode' of {_name(model)} to return floats, got {_got(got)}")
    if not torch.isfinite(got).all():
        _fail(f"'encode' of {_name(model)} to return finite numbers, got NaN or infinity")
    return got.float()


def _check_prediction(model: Any, part: str, rows: int, got: Any) -> None:
    what = f"'{part}' of {_name(model)} to return"
    c, h, w = model.latent_shape
    if not isinstance(got, torch.Tensor):
        hint = ": return its 'sample'" if hasattr(got, "sample") else ""
        _fail(f"{what} a tensor, got {type(got).__name__}{hint}")
    if list(got.shape) not in ([rows, c, h, w], [rows, 2 * c, h, w]):
        _fail(f"{what} [{rows}, {c} or {2 * c}, {h}, {w}], got {list(got.shape)}")
    if got.dtype not in PREDICTIONS:
        _fail(f"{what} float32, bfloat16 or float16, got {_got(got.dtype)}")
    if got.device.type != model.device.type:
        _fail(f"{what} a prediction on its device, {model.device}, got one on {got.device}")


def _modules(model: Any) -> Iterator[nn.Module]:
    """All modules that the model is, or holds."""
    owners = [model, optional(model, "network"), *getattr(model, "__dict__", {}).values()]
    for owner in owners:
        if isinstance(owner, nn.Module):
            yield from owner.modules()


def _is_random(module: nn.Module) -> bool:
    """Whether it does something else in training than outside."""
    dropout = getattr(module, "p", None) if isinstance(module, nn.modules.dropout._DropoutNd) else 0
    if isinstance(module, nn.MultiheadAttention):
        dropout = module.dropout
    return bool(dropout) or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _name(model: Any) -> str:
    name = getattr(model, "name", None)
    return name if isinstance(name, str) and name else type(model).__name__


def _got(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return shown(value).removeprefix("torch.")


def _fail(expected: str) -> NoReturn:
    raise ModelError(f"expected {expected}.")
