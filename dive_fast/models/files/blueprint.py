"""What a configuration makes, compared with what the weights hold, before memory is taken for it.

A class is built on the meta device, where tensors have shapes and no content, and no further than
the weights can fill: a configuration of a million layers is refused after a few.
"""

from __future__ import annotations

import re
import threading
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from dive_fast.core.config import LARGEST, Config, shown
from dive_fast.core.numbers import is_number
from dive_fast.errors import ModelError
from dive_fast.models.files.tensors import FLOATS, Entry

# Of what is computed from the configuration, such as tables of positions: 256 MiB in float32.
MAX_COMPUTED = 1 << 26
LARGEST_SIDE = 4096  # of latents, or of images where there is no VAE
MAX_LIST = 256  # entries of a list in a configuration; published ones have one per level or layer
_ADAPTER = re.compile(r"(^|\.)(base_layer|lora_(A|B|embedding_A|embedding_B|up|down))(\.|$)")
_SIZES = {
    "sample_size": LARGEST_SIDE,
    "patch_size": LARGEST_SIDE,
    "pos_embed_max_size": LARGEST_SIDE,
    "image_size": LARGEST_SIDE,
    "num_attention_heads": LARGEST,
    "attention_head_dim": LARGEST,
    "in_channels": LARGEST,
    "out_channels": LARGEST,
    "latent_channels": LARGEST,
    "block_out_channels": LARGEST,
    "layers_per_block": LARGEST,
    "norm_num_groups": LARGEST,
    # Of our own networks, of which some copy a layer before they register it.
    "layers": 1024,
    "num_train_timesteps": 10**6,
}
"""What is at least 1, and at most so much."""


class _TooManyParameters(Exception):
    pass


def build_within(build: Callable[[], torch.nn.Module], n_weights: int) -> torch.nn.Module | None:
    """What ``build`` makes, on the meta device; None where it needs far more than ``n_weights``."""
    try:
        # With room for a layer or two: then a sentence can say what is missing.
        with _at_most(2 * n_weights + 1000), torch.device("meta"):
            return build()
    except _TooManyParameters:
        return None


def check_fits(
    model: torch.nn.Module,
    found: Mapping[str, Entry],
    ignored: Callable[[str], bool],
    directory: Path,
) -> None:
    """That weights of these names, shapes and types fill a model on the meta device.

    Args:
        ignored: whether a surplus weight is no harm.

    Raises:
        ModelError: they do not, or the model computes tables beyond ``MAX_COMPUTED``.
    """
    expected = model.state_dict()
    misfit = f"the weights in {directory} do not fit its config.json:"
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(name for name in found.keys() - expected.keys() if not ignored(name))
    if adapters := [name for name in surplus if _ADAPTER.search(name)]:
        raise ModelError(
            f"{misfit} {len(surplus)} unexpected keys, the first is {adapters[0]}: they hold an "
            f"unfused LoRA adapter, which is not supported; fuse it into the weights first."
        )
    for kind, names in (("missing", missing), ("unexpected", surplus)):
        if names:
            raise ModelError(f"{misfit} {len(names)} {kind} keys, the first is {names[0]}.")
    for name, tensor in expected.items():
        entry = found[name]
        if entry.shape != tuple(tensor.shape):
            raise ModelError(
                f"{directory} cannot be loaded as {type(model).__name__}: size mismatch for "
                f"{name}: {list(entry.shape)}, expected {list(tensor.shape)}."
            )
        if tensor.is_floating_point() and entry.dtype not in FLOATS:
            raise ModelError(
                f"expected weights of {', '.join(sorted(FLOATS))} in {entry.file}, got {name} of "
                f"{entry.dtype}."
            )
    computed = sum(b.numel() for name, b in model.named_buffers() if name not in expected)
    if computed > MAX_COMPUTED:
        raise ModelError(
            f"the config.json in {directory} makes tables of {computed} numbers beside the "
            f"weights, expected at most {MAX_COMPUTED}."
        )


def check_values(annotated: Callable[..., Any] | type, config: Config) -> None:
    """That the values which a constructor takes are of the kinds that its annotations say.

    Constructors compute with what they are given, and some only when the network first runs. Null
    is left to them, as published configurations have it in many places.

    Args:
        annotated: the constructor, or a class whose attributes are the entries.

    Raises:
        ModelError: a text where a number belongs, a number that is not finite or beyond any size,
            or a list that is too long.
    """
    try:
        hints = typing.get_type_hints(annotated)
    except (NameError, TypeError):  # annotations of another version that cannot be resolved
        return
    for key, hint in hints.items():
        if config.content.get(key) is not None:
            kinds = _kinds(hint)
            if kinds:
                _check_value(config, key, config.content[key], kinds)


def _check_value(config: Config, key: str, value: Any, kinds: set[type]) -> None:
    if isinstance(value, list):
        if len(value) > MAX_LIST:
            raise ModelError(
                f"{key} in {config.where} must have at most {MAX_LIST} entries, got {len(value)}."
            )
        # diffusers takes the two sides of images where its annotations say one.
        if not kinds & {tuple, list} and key != "sample_size":
            _refuse(config, key, value, kinds)
        for inner in value:
            if inner is not None:
                _check_value(config, key, inner, kinds)
        return
    if isinstance(value, dict):
        good = dict in kinds
    elif isinstance(value, bool | str):
        good = type(value) in kinds
    elif isinstance(value, float):
        good = is_number(value) and (float in kinds or (int in kinds and value.is_integer()))
    else:
        good = bool(kinds & {int, float}) and abs(value) <= LARGEST
    if not good:
        _refuse(config, key, value, kinds)
    if key in _SIZES and isinstance(value, int | float) and not 1 <= value <= _SIZES[key]:
        raise ModelError(
            f"{key} in {config.where} must be from 1 to {_SIZES[key]}, got {shown(value)}."
        )


def _refuse(config: Config, key: str, value: Any, kinds: set[type]) -> None:
    words = {bool: "true or false", str: "a text", float: "a number", int: "a whole number"}
    words |= {tuple: "a list", list: "a list", dict: "an object"}
    shown_kinds = kinds - {int} if float in kinds else kinds
    expected = " or ".join(
        dict.fromkeys(word for kind, word in words.items() if kind in shown_kinds)
    )
    raise ModelError(f"{key} in {config.where} must be {expected}, got {shown(value)}.")


def _kinds(hint: Any) -> set[type]:
    """The JSON kinds that an annotation names; empty where it names others, or any."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_kinds(part) for part in inner if part is not type(None)]
        return set().union(*parts) if all(parts) else set()
    if origin in (tuple, list):
        parts = [_kinds(part) for part in inner if part not in (Ellipsis, type(None))]
        return {origin}.union(*parts) if all(parts) and parts else set()
    if origin is dict or hint is dict:
        return {dict}
    return {hint} if hint in (bool, int, float, str) else set()


@contextmanager
def _at_most(n: int) -> Iterator[None]:
    """Stops what is built in this thread at its n-th parameter."""
    thread, count = threading.get_ident(), 0

    def registered(module: torch.nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        if parameter is not None and threading.get_ident() == thread:
            count += 1
            if count > n:
                raise _TooManyParameters

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
