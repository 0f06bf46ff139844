"""LoRA weights fused into the parts of a diffusers pipeline, by its own loader and peft.

diffusers logs what it does not use of a file, and goes on. Here every tensor of the file must
arrive in a layer, and every layer that is made must have its tensors from the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dive_fast.errors import ModelError, some
from dive_fast.models.files.lora import Lora
from dive_fast.models.files.reading import first_line
from dive_fast.models.text.encoders import import_transformers, quiet_transformers

_LAYER = re.compile(r"(^|\.)(lora|lokr)_")  # within the name of an adapter's parameter
ADAPTER, ADAPTER_CONFIG = "adapter_model", "adapter_config.json"  # as peft calls its files
_PEFT = "base_model.model."  # before the names in them
_LONGEST = 300  # of a library's message, which may list every layer


def fuse(lora: Lora, pipeline: Any) -> None:
    """Adds the LoRA's differences, times its scale, to the weights of the pipeline's parts.

    Args:
        pipeline: a diffusers pipeline with its network and its text encoders, in float32.

    Raises:
        ModelError: the LoRA is another network's, not all of it can be used, or it holds NaN.
    """
    where, kind = f"the LoRA {lora.name}", type(pipeline).__name__
    parts = {
        name: part
        for name in pipeline._lora_loadable_modules
        if (part := getattr(pipeline, name, None)) is not None
    }
    before = {name: _shapes(part) for name, part in parts.items()}
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            file = _for_diffusers(lora.file, parts, Path(folder))
            safe = {"use_safetensors": None if lora.is_pickled else True}
            tensors = _read(file, pipeline, parts, **safe)
            _check_parts(tensors, parts, where, kind)
            pipeline.load_lora_weights(str(file), local_files_only=True, **safe)
            _check_used(tensors, parts, where)
            # What is fused if nobody says leaves the text encoder of some pipelines out.
            pipeline.fuse_lora(components=list(parts), lora_scale=lora.scale)
            pipeline.unload_lora_weights()
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # diffusers, peft and torch raise their own kinds
        said = textwrap.shorten(first_line(error), _LONGEST, placeholder=" ...")
        raise ModelError(f"{where} cannot be applied to this {kind}: {said}") from error
    for name, part in parts.items():
        _check_fused(part, before[name], f"{where} at the scale {lora.scale:g}", name)
        part.eval().requires_grad_(False)


def _for_diffusers(file: Path, parts: dict[str, nn.Module], folder: Path) -> Path:
    """The file itself, or of peft's own directories one that diffusers reads.

    peft leaves out which part the adapter is of, and has what scales it in another file.
    """
    if file.name != f"{ADAPTER}.safetensors" or not file.with_name(ADAPTER_CONFIG).is_file():
        return file
    from peft import LoraConfig

    (network,) = (name for name in parts if not name.startswith("text_encoder"))
    config = LoraConfig.from_pretrained(str(file.parent)).to_dict()
    stated = {f"{network}.{k}": list(v) if isinstance(v, set) else v for k, v in config.items()}
    tensors = {f"{network}.{k.removeprefix(_PEFT)}": v for k, v in load_file(file).items()}
    made = folder / "adapter.safetensors"
    save_file(tensors, made, {"lora_adapter_metadata": json.dumps(stated, default=str)})
    return made


def _read(file: Path, pipeline: Any, parts: dict[str, nn.Module], **how: Any) -> dict[str, Tensor]:
    """The file's tensors by the names that diffusers has for them, whatever wrote it."""
    # By the layout of its UNet SDXL tells the names of the original code.
    layout = {"unet_config": parts["unet"].config} if "unet" in parts else {}
    found = pipeline.lora_state_dict(str(file), local_files_only=True, **how, **layout)
    state = found[0] if isinstance(found, tuple) else found
    return {key: value for key, value in state.items() if not key.endswith("alpha")}


def _check_parts(
    tensors: dict[str, Tensor], parts: dict[str, nn.Module], where: str, kind: str
) -> None:
    """That every tensor is for a part that is there, and finite."""
    others = [key for key in tensors if key.partition(".")[0] not in parts]
    if others:
        raise ModelError(
            f"{where} does not fit this {kind}: expected weights of {' and '.join(parts)}, got "
            f"{len(others)} of others, the first is {others[0]}."
        )
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ModelError(f"{where} is not finite: {key} holds NaN or inf.")


def _check_used(tensors: dict[str, Tensor], parts: dict[str, nn.Module], where: str) -> None:
    """That the layers hold what the file holds, by value: names are changed on the way."""
    layers = {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.named_parameters()
        if _LAYER.search(name)
    }
    taken = {digest(value) for value in layers.values() if not value.is_meta}
    given = {digest(value) for value in tensors.values()}
    if unused := [key for key, value in tensors.items() if digest(value) not in taken]:
        raise ModelError(
            f"{where} does not fit this model, which has no place for {len(unused)} of its "
            f"{len(tensors)} weights: {some(unused, 1)}."
        )
    for name, value in layers.items():
        if value.is_meta or digest(value) not in given:
            raise ModelError(f"{where} is not complete: it lacks {name}.")


def digest(value: Tensor) -> bytes:
    """Of its numbers, in whatever precision and shape they were written."""
    numbers = value.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(numbers, digest_size=16).digest()


def _shapes(part: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in part.state_dict().items()}


def _check_fused(part: nn.Module, before: dict[str, torch.Size], where: str, name: str) -> None:
    """That the part has the weights that it had, and that they are numbers."""
    if changed := sorted(set(_shapes(part).items()) ^ set(before.items())):
        raise ModelError(
            f"{where} changes the shape of the {name}, as one for controlled generation does: "
            f"{changed[0][0]}."
        )
    for key, value in part.state_dict().items():
        if not torch.isfinite(value).all():
            raise ModelError(f"{where} makes weights that are not finite: {key} of the {name}.")


@contextmanager
def quiet() -> Iterator[None]:
    """No logging of what becomes one sentence, and no bars."""
    from diffusers.utils import logging as own

    bars = own.is_progress_bar_enabled()
    own.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), quiet_transformers(import_transformers()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                own.enable_progress_bar()
