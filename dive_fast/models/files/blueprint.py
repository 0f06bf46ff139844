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
from typing import Any, NamedTuple, NoReturn

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from dive_fast.core.config import LARGEST, LARGEST_FLOAT, Config
from dive_fast.core.numbers import is_number
from dive_fast.errors import ModelError, shown
from dive_fast.models.files.tensors import FLOATS, Entry

# Of what is computed from the configuration, such as tables of positions: 128 MiB in float32.
MAX_COMPUTED = 1 << 25
LARGEST_SIDE = 4096  # of latents, or of images where there is no VAE
MAX_LIST = 256  # entries of a list in a configuration; published ones have one per level or layer
# Of adapters that ``adapters`` does not read: IA3, LoHa, LoKr, and those of old diffusers.
_ADAPTER = re.compile(
    r"(^|\.)(base_layer|original_module|modules_to_save|(\w+_)?lora|(lora|ia3|hada|lokr)_\w+)\."
)
# What values of these names must lie between, in whichever class.
_BOUNDS = {
    **dict.fromkeys(("sample_size", "patch_size", "pos_embed_max_size"), (1, LARGEST_SIDE)),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "out_channels",
            "latent_channels",
            "block_out_channels",
            "layers_per_block",
            "norm_num_groups",
        ),
        (1, LARGEST),
    ),
    # Beyond that nothing is left of what is normed.
    "norm_eps": (0, 0.1),
    "dropout": (0, 1),
    "downsample_padding": (0, 16),
    # Of our own networks, of which some copy a layer before they register it.
    "layers": (1, 1024),
    "num_train_timesteps": (1, 10**6),
}


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
    stated: str,
) -> None:
    """That weights of these names, shapes and types fill a model on the meta device.

    Args:
        ignored: whether a surplus weight is no harm.
        stated: what made the model, for sentences, such as "its config.json".

    Raises:
        ModelError: they do not, or the model computes tables beyond ``MAX_COMPUTED``.
    """
    expected = model.state_dict()
    misfit = f"the weights in {directory} do not fit {stated}:"
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(name for name in found.keys() - expected.keys() if not ignored(name))
    if adapters := [name for name in surplus if _ADAPTER.search(name)]:
        raise ModelError(
            f"{misfit} {len(surplus)} unexpected keys, the first is {adapters[0]}: they hold an "
            f"unfused adapter of a kind that is not read; fuse it (diffusers' fuse_lora, "
            f"unload_lora_weights, save_pretrained), or give the plain weights with the LoRA apart "
            f"(lora=, --lora)."
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
            f"in {directory} {stated} makes tables of {computed} numbers beside the "
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
        kinds = _kinds(hint)
        if kinds is not None and config.content.get(key) is not None:
            _check_value(config, key, config.content[key], kinds)


class _Kinds(NamedTuple):
    """What an annotation takes.

    Attributes:
        single: of bool, int, float, str, dict.
        listed: the same of the entries of a list; None where it takes no list.
    """

    single: frozenset[type]
    listed: frozenset[type] | None = None


def _check_value(config: Config, key: str, value: Any, kinds: _Kinds) -> None:
    if isinstance(value, list):
        if len(value) > MAX_LIST:
            raise ModelError(
                f"{key} in {config.where} must have at most {MAX_LIST} entries, got {len(value)}."
            )
        # diffusers takes the two sides of images where its annotations say one.
        listed = kinds.single if key == "sample_size" else kinds.listed
        if listed is None:
            _refuse(config, key, value, kinds)
        for inner in value:
            # Entries that are lists themselves, and null, are left to the constructor.
            if inner is not None:
                _check_value(config, key, inner, _Kinds(listed, listed))
        return
    single = kinds.single
    if isinstance(value, dict):
        good = dict in single
    elif isinstance(value, bool | str):
        good = type(value) in single
    elif isinstance(value, float):
        good = is_number(value) and (float in single or (int in single and value.is_integer()))
    else:
        good = bool(single & {int, float}) and abs(value) <= LARGEST
    if not good:
        _refuse(config, key, value, kinds)
    least, most = _BOUNDS.get(key, (-LARGEST_FLOAT, LARGEST_FLOAT))
    if isinstance(value, int | float) and not least <= value <= most:
        raise ModelError(
            f"{key} in {config.where} must be from {least} to {most}, got {shown(value)}."
        )


def _refuse(config: Config, key: str, value: Any, kinds: _Kinds) -> NoReturn:
    words = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}
    named = kinds.single - {int} if float in kinds.single else kinds.single
    expected = [word for kind, word in (words | {dict: "an object"}).items() if kind in named]
    expected += [] if kinds.listed is None or kinds.single == kinds.listed else ["a list"]
    raise ModelError(
        f"{key} in {config.where} must be {' or '.join(expected)}, got {shown(value)}."
    )


def _kinds(hint: Any) -> _Kinds | None:
    """What an annotation takes; None where it names other kinds than JSON has, or any."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_kinds(part) for part in inner if part is not type(None)]
        if not parts or any(part is None for part in parts):
            return None
        single = frozenset().union(*(part.single for part in parts))
        lists = [part.listed for part in parts if part.listed is not None]
        return _Kinds(single, frozenset().union(*lists) if lists else None)
    if origin in (tuple, list):
        parts = [_kinds(part) for part in inner if part not in (Ellipsis, type(None))]
        if not parts or any(part is None for part in parts):
            return None
        lists = [part.listed for part in parts if part.listed is not None]
        return _Kinds(frozenset(), frozenset().union(*(part.single for part in parts), *lists))
    if hint in (tuple, list):
        return _Kinds(frozenset(), frozenset({bool, int, float, str}))
    if origin is dict or hint is dict:
        return _Kinds(frozenset({dict}))
    return _Kinds(frozenset({hint})) if hint in (bool, int, float, str) else None


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
