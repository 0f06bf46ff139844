"""The blocks of a network by name, and which part of what a block gives is the image's.

Blocks are what a network keeps in a ``ModuleList``: it calls them one after the other. diffusers'
UNets have a mid block beside their lists, and some transformers lists for the prompt alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import nn

from dive_fast.core.numbers import is_whole
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.protocol import Model, optional

# What diffusers' networks run on something else than the image.
_BESIDE = ("context_refiner", "siglip_refiner")
_MIDDLE, _UP = "mid_block", "up_blocks"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def layer_names(model: Model) -> tuple[str, ...]:
    """The names of a model's blocks, in the order in which the network holds them.

    Blocks are the entries of the outermost lists of modules, named as in ``named_modules``; of a
    network without any, its own parts but for embeddings.

    Raises:
        ModelError: the model does not state its network.
    """
    network = _network(model)
    names = list(_blocks(network, ""))
    if not names:
        parts = network.named_children()
        names = [name for name, part in parts if not isinstance(part, (nn.Embedding, *_CONTAINERS))]
    ups = [name for name in names if name.startswith(f"{_UP}.")]
    if ups and getattr(network, _MIDDLE, None) is not None:
        names = [name for name in names if not name.startswith(f"{_MIDDLE}.")]
        names.insert(names.index(ups[0]), _MIDDLE)
    return tuple(names)


def find_layer(model: Model, layer: str | int) -> tuple[str, nn.Module]:
    """A block by its name or its index in ``layer_names``, or another module by its name in dots.

    Raises:
        DiveFastError: there is none; it says what there is.
        ModelError: the model does not state its network.
    """
    network, names = _network(model), layer_names(model)
    if isinstance(layer, str):
        module = dict(network.named_modules()).get(layer)
        known = module is not None and not isinstance(module, _CONTAINERS)
        if known and layer and layer.split(".")[0] not in _BESIDE:
            return layer, module
    elif is_whole(layer) and -len(names) <= layer < len(names):
        return names[layer], network.get_submodule(names[layer])
    raise DiveFastError(
        f"expected a layer of {model.name} as an index in [{-len(names)}, {len(names)}) or one of "
        f"{_listed(names) or 'none'}, or another module of its network in dots, got {shown(layer)}."
    )


def image_part(module: nn.Module, output: Any) -> Any:
    """Of what a module gives, the activations of the image.

    That is the first tensor of several, as in UNets' down blocks, but in diffusers' joint blocks,
    which give the prompt's tokens first.
    """
    if not isinstance(output, tuple | list):
        return output
    tensors = [entry for entry in output if isinstance(entry, torch.Tensor)]
    if not tensors:
        return output
    joint = "encoder_hidden_states" in inspect.signature(type(module).forward).parameters
    flat = all(entry is None or isinstance(entry, torch.Tensor) for entry in output)
    return tensors[-1] if joint and flat and len(output) == 2 else tensors[0]


def _network(model: Model) -> nn.Module:
    network = optional(model, "network")
    if network is None:
        raise ModelError(
            f"expected a model with an attribute 'network' for its layers, got {model.name}."
        )
    return network


def _blocks(module: nn.Module, prefix: str) -> Iterator[str]:
    """The entries of the outermost lists below a module; a list in a list is no block."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if name in _BESIDE:
            continue
        if isinstance(module, nn.ModuleList) and not isinstance(child, _CONTAINERS):
            yield path
        else:
            yield from _blocks(child, f"{path}.")


def _listed(names: tuple[str, ...]) -> str:
    """The names, those of one list as its first to its last."""
    found = []
    for _, group in groupby(names, key=lambda name: name.rpartition(".")[0] or name):
        first, *others = group
        found.append(f"{first} to {others[-1]}" if others else first)
    return ", ".join(found)
