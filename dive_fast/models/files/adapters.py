"""Weights that were saved with a LoRA adapter beside them, not fused: read as the sum of both.

diffusers' ``save_pretrained`` of a network with ``add_adapter`` writes of each layer that has one

    LAYER.base_layer.weight     W, and LAYER.base_layer.bias
    LAYER.lora_A.NAME.weight    A, with the shape of W but for its r rows
    LAYER.lora_B.NAME.weight    B, of r columns

and the layer computes with W + alpha / r B A. Here that is its weight, under the name that it has
without an adapter. alpha is in peft's ``adapter_config.json``, which only peft itself writes.

What was saved after ``fuse_lora`` without ``unload_lora_weights`` has the same names and shapes,
with B A in W already: nothing in the files tells the two apart. It is read as if it were unfused.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dive_fast.core.config import Config
from dive_fast.errors import ModelError, shown, some
from dive_fast.models.files.beside import tell_of
from dive_fast.models.files.reading import read_config
from dive_fast.models.files.tensors import FLOATS, Entry

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
_PEFT = "base_model.model."  # before all names of a ``PeftModel``
_BASE = "base_layer."
_PART = re.compile(r"(?P<layer>.+?)\.(?P<part>(base_layer|lora_[a-zA-Z_]+)\..+)")
_HALF = re.compile(r"lora_[AB]\.(?P<adapter>[^.]+)\.weight")
_FUSE = "fuse it (diffusers' fuse_lora, unload_lora_weights, save_pretrained)"
# What a configuration of peft's can ask that is more than W + scale B A.
_MORE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


class Tensors(Protocol):
    """Files of weights, as ``tensors.SafeTensors`` and ``tensors.PickledTensors`` read them."""

    entries: dict[str, Entry]

    def fill(self, entry: Entry, target: Tensor) -> None:
        """Copies the values of an entry into a tensor of its shape."""


class _Added(NamedTuple):
    """What is added to a weight: ``scale`` B A."""

    a: Entry
    b: Entry
    scale: float


class WithAdapter:
    """Files whose layers have an adapter, as if it had been fused.

    Attributes:
        entries: by the names without the adapter; nothing has been read of them.
        n_layers: that have one.
    """

    def __init__(
        self, tensors: Tensors, entries: dict[str, Entry], added: dict[str, _Added], where: Path
    ) -> None:
        self.entries, self.n_layers = entries, len(added)
        self._tensors, self._where = tensors, where
        # Names are changed later: a key and its file belong to one weight.
        self._added = {(entries[n].file, entries[n].key): each for n, each in added.items()}

    def fill(self, entry: Entry, target: Tensor) -> None:
        """The weight's values, with the adapter's added in float32.

        Takes memory for one weight in float32 beside the target, where that is of another type.

        Raises:
            ModelError: the adapter holds NaN or inf; and as the files' own ``fill``.
        """
        added = self._added.get((entry.file, entry.key))
        if added is None:
            self._tensors.fill(entry, target)
            return
        in_place = target.dtype == torch.float32 and target.is_contiguous()
        weight = target if in_place else torch.empty(target.shape, dtype=torch.float32)
        self._tensors.fill(entry, weight)
        a, b = (self._half(half) for half in (added.a, added.b))
        weight.view(len(b), -1).addmm_(b, a, alpha=added.scale)
        if not in_place:
            target.copy_(weight)

    def _half(self, entry: Entry) -> Tensor:
        """A as [r, inputs] or B as [outputs, r], in float32."""
        half = torch.empty(entry.shape, dtype=torch.float32)
        self._tensors.fill(entry, half)
        if not half.isfinite().all():
            raise ModelError(
                f"the weights in {self._where} are not finite: {entry.key} holds NaN or inf."
            )
        return half.flatten(1)


def with_adapter(tensors: Tensors, directory: Path) -> Tensors:
    """The tensors themselves, or where they hold an unfused LoRA adapter, those with it fused.

    Shapes and types are compared as the files' headers have them; no values are read.

    Args:
        directory: of the files, with the adapter's ``adapter_config.json``; alpha is r without it.

    Raises:
        ModelError: an adapter of another kind (DoRA, of embeddings), several, a layer that lacks a
            half, shapes that do not fit, or a configuration of another adapter.
    """
    plain, layers = _sorted(tensors.entries)
    if not layers:
        return tensors
    where = f"the weights in {directory} hold an unfused adapter"
    names = {name for layer, parts in layers.items() for name in _adapters(layer, parts, where)}
    if len(names) > 1:
        raise ModelError(f"{where}: expected one, got {some(sorted(names))}; {_FUSE}.")
    halves = {layer: _halves(layer, parts, where) for layer, parts in layers.items()}
    for layer, parts in layers.items():
        for part, entry in parts.items():
            name = f"{layer}.{part.removeprefix(_BASE)}"
            if part.startswith(_BASE) and plain.setdefault(name, entry) is not entry:
                raise ModelError(f"{where}, and {name} beside {layer}.{part}: expected one.")
    config = _config(directory)
    added = {
        f"{layer}.weight": _Added(a, b, _scale(layer, a.shape[0], config))
        for layer, (a, b) in halves.items()
    }
    return WithAdapter(tensors, plain, added, directory)


def tell_of_adapter(tensors: Tensors, directory: Path) -> None:
    """One warning where alpha had to be guessed, or is that of an adapter which is not there."""
    stated = (directory / CONFIG).is_file()
    if isinstance(tensors, WithAdapter) and not stated:
        log.warning(
            "the weights in %s hold a LoRA adapter (%d layers), and no %s says its alpha: it is "
            "added with alpha = r, at the scale 1. If it was fused when they were saved (fuse_lora "
            "without unload_lora_weights), which the files cannot show, it is added twice.",
            directory,
            tensors.n_layers,
            CONFIG,
        )
    # Of an adapter's own file ``beside`` tells.
    lone = stated and not any(directory.glob("adapter_model.*"))
    if lone and not isinstance(tensors, WithAdapter):
        tell_of([f"{directory.name}/{CONFIG}"], directory.parent)


def check_not_alone(directory: Path) -> None:
    """Raises ModelError for a folder that has an adapter where a model's weights are missing.

    transformers' ``save_pretrained`` of a model with ``add_adapter`` writes nothing else.
    """
    if alone := sorted(path.name for path in directory.glob("adapter_model.*")):
        raise ModelError(
            f"{directory} holds a LoRA adapter alone ({alone[0]}), as transformers saves a model "
            f"that has one: expected its config.json and its own weights as well."
        )


def _sorted(entries: dict[str, Entry]) -> tuple[dict[str, Entry], dict[str, dict[str, Entry]]]:
    """Weights of layers without an adapter by name, and of those with one by layer and part."""
    if all(name.startswith(_PEFT) for name in entries):
        entries = {name.removeprefix(_PEFT): entry for name, entry in entries.items()}
    plain: dict[str, Entry] = {}
    layers: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        if match := _PART.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["part"]] = entry
        else:
            plain[name] = entry
    return plain, layers


def _adapters(layer: str, parts: dict[str, Entry], where: str) -> set[str]:
    """The names of a layer's adapters, which are all LoRAs that can be fused."""
    names = set()
    for part in parts:
        if part in (f"{_BASE}weight", f"{_BASE}bias"):
            continue
        match = _HALF.fullmatch(part)
        if match is None:
            raise ModelError(
                f"{where} of a kind that is not supported ({layer}.{part}): expected a LoRA of "
                f"linear layers and convolutions (base_layer, lora_A, lora_B); {_FUSE}."
            )
        names.add(match["adapter"])
    return names


def _halves(layer: str, parts: dict[str, Entry], where: str) -> tuple[Entry, Entry]:
    """A and B of a layer that has one adapter, which fit its weight."""
    by_kind = {part.partition(".")[0]: entry for part, entry in parts.items()}
    by_kind["base_layer"] = parts.get(f"{_BASE}weight")
    base, a, b = (by_kind.get(kind) for kind in ("base_layer", "lora_A", "lora_B"))
    if base is None or a is None or b is None:
        named = {f"{_BASE}weight": base, "lora_A": a, "lora_B": b}
        raise ModelError(
            f"{where} that is not complete: it lacks "
            f"{' and '.join(f'{layer}.{part}' for part, entry in named.items() if entry is None)}."
        )
    for entry in (base, a, b):
        if entry.dtype not in FLOATS:
            raise ModelError(
                f"expected weights of {', '.join(sorted(FLOATS))} in {entry.file}, got {entry.key} "
                f"of {entry.dtype}."
            )
    r, ones = a.shape[:1], (1,) * (len(base.shape) - 2)
    fits = len(base.shape) > 1 and a.shape == r + base.shape[1:] and r > (0,)
    if not fits or b.shape != base.shape[:1] + r + ones:
        raise ModelError(
            f"{where} that does not fit: {a.key} of {list(a.shape)} and {b.key} of {list(b.shape)} "
            f"beside a weight of {list(base.shape)}."
        )
    return a, b


def _config(directory: Path) -> Config | None:
    """What peft wrote of the adapter; None where nothing is there."""
    path = directory / CONFIG
    if not path.is_file():
        return None
    config = read_config(path)
    kind = config.text("peft_type", "LORA")
    if kind != "LORA":
        raise ModelError(f"expected the peft_type LORA in {path}, got {shown(kind)}.")
    if more := [key for key in _MORE if config.content.get(key)]:
        raise ModelError(
            f"{path} states {more[0]}, which is not supported: expected a plain LoRA; {_FUSE}."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in Config(f"{key} in {path}", config.content.get(key) or {}).content:
            try:
                _ends_with(pattern)
            except re.error as error:
                raise ModelError(
                    f"{key} in {path} must name layers by regular expressions, got "
                    f"{shown(pattern)}: {error}."
                ) from error
    return config


def _scale(layer: str, rank: int, config: Config | None) -> float:
    """alpha / r as peft has it for a layer, whose r is that of its weights."""
    if config is None:
        return 1.0
    stated, key = _of_layer(layer, "rank_pattern", "r", config)
    if (r := stated.whole(key, at_least=1)) != rank:
        raise ModelError(
            f"{config.where} states the rank {r} for {layer}, but its lora_A in the weights has "
            f"{rank}: it is of another adapter."
        )
    stated, key = _of_layer(layer, "alpha_pattern", "lora_alpha", config)
    root = config.flag("use_rslora", False)
    return stated.number(key) / (math.sqrt(rank) if root else rank)


def _of_layer(layer: str, patterns: str, default: str, config: Config) -> tuple[Config, str]:
    """Where a layer's value stands, and its key: of the first pattern that is its name's end."""
    by_pattern = config.content.get(patterns) or {}
    for pattern in by_pattern:
        if _ends_with(pattern).match(layer):
            return Config(f"{patterns} in {config.where}", by_pattern), pattern
    return config, default


def _ends_with(pattern: str) -> re.Pattern[str]:
    """As peft takes it: of a whole name, or of its end after a dot."""
    return re.compile(rf"(.*\.)?({pattern})$")
