"""Text encoders of transformers, of whatever class: made and filled as ``checkpoint`` asks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn

from dive_fast.core.config import Config
from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import Library
from dive_fast.models.files.tensors import DTYPES, Entry

# Of an encoder's weights in float32. Larger ones keep the precision of their files beside a network
# in half precision: a T5-XXL is 9.5 GB in bfloat16.
LARGE = 1 << 30
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

    def dtype(self, entries: Mapping[str, Entry], asked: torch.dtype) -> torch.dtype:
        """float32, but that of most weights in the file for ``LARGE`` ones beside half precision.

        Encoders run once per prompt, and what small ones give in float32 is nearer to the truth.
        """
        numbers: dict[str, int] = {}
        for entry in entries.values():
            numbers[entry.dtype] = numbers.get(entry.dtype, 0) + prod(entry.shape)
        if asked == torch.float32 or 4 * sum(numbers.values()) <= LARGE:
            return torch.float32
        most = DTYPES.get(max(numbers, key=numbers.__getitem__))
        return most if most in (torch.float16, torch.bfloat16) else torch.float32

    def kept(self, model: nn.Module, dtype: torch.dtype) -> Collection[str]:
        """What transformers itself keeps in float32, such as T5's ``wo`` beside float16."""
        always = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        beside = getattr(model, "_keep_in_fp32_modules", None) or ()
        return (*always, *(beside if dtype == torch.float16 else ()))

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


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
