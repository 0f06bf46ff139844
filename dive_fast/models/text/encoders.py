"""Text encoders of transformers, of whatever class: made and filled as ``checkpoint`` asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dive_fast.core.config import Config
from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import Library
from dive_fast.models.files.tensors import Entry

_SIZES = (
    "vocab_size",
    "hidden_size",
    "d_model",
    "d_ff",
    "d_kv",
    "intermediate_size",
    "num_attention_heads",
    "num_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_COUNTS = ("num_hidden_layers", "num_layers")


class TransformersLibrary(Library):
    """How a ``PreTrainedModel`` is made and filled."""

    safe_stem, pickle_stem = "model", "pytorch_model"

    def check_config(self, model_class: type, config: Config) -> None:
        for key in (*_COUNTS, *_SIZES):
            config.whole(key, None, at_least=int(key in _SIZES))

    def build(self, model_class: type, config: Mapping[str, Any]) -> nn.Module:
        with quiet_transformers(import_transformers()):
            return model_class(model_class.config_class.from_dict(dict(config))).float()

    def materialise(
        self, model_class: type, config: Mapping[str, Any], blueprint: nn.Module
    ) -> nn.Module:
        # To fill billions of weights with random numbers first takes minutes.
        with _weights_elsewhere(), torch.device("cpu"):
            model = self.build(model_class, config)
        return _with_memory(model)

    def named(self, model: nn.Module, entries: dict[str, Entry]) -> dict[str, Entry]:
        """Also by the names that the whole model has for its part, and those of tied weights."""
        prefix = f"{model.base_model_prefix}."
        names = {name.removeprefix(prefix): name for name in model.state_dict()}
        found = {names.get(n.removeprefix(prefix), n): entry for n, entry in entries.items()}
        for tied in _tied(model):
            known = [found[name] for name in tied if name in found]
            found |= {name: known[0] for name in tied if known and name not in found}
        return found

    def ignored(self, model: nn.Module, name: str) -> bool:
        # The other half of a model of which this is one, and its head over the vocabulary.
        return name.startswith(("decoder.", "lm_head.")) or super().ignored(model, name)


def import_transformers() -> Any:
    """The module.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "text-conditional models need transformers, which is not installed: "
            "pip install 'dive_fast[text]'."
        ) from error
    return transformers


@contextmanager
def quiet_transformers(transformers: Any) -> Iterator[None]:
    """No bars for each little file, and no report of what becomes one sentence."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextmanager
def _weights_elsewhere() -> Iterator[None]:
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


def _with_memory(model: nn.Module) -> nn.Module:
    """The parameters in memory, unfilled; tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
                module._parameters[name] = made[id(parameter)]
    return model


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
