"""Model families: the only home of diffusers' internals."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dive_fast.errors import ModelError, shown
from dive_fast.models.failing import naming
from dive_fast.models.files.beside import tell_what_is_not_applied
from dive_fast.models.files.lora import find_lora
from dive_fast.models.files.reading import first_line
from dive_fast.models.files.sidecar import Fitted, apply_fitted, read_fitted
from dive_fast.models.files.weights import check_variant
from dive_fast.models.protocol import Model
from dive_fast.models.source import Source, register_model_family, resolve, without_lora
from dive_fast.models.text.prompts import Classes

__all__ = [
    "DTYPES",
    "Source",
    "check_place",
    "load_model",
    "register_model_family",
    "resolve",
    "usable_device",
]

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    source: str | Path | Source,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    timestep_embedding: str = "auto",
    classes: Classes | None = None,
    templates: Sequence[str] | None = None,
    average: str | None = None,
    variant: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    prediction_type: str | None = None,
) -> Model:
    """A model of the zoo, of a directory, a single file or the hub, frozen and in place.

    Args:
        source: a zoo name ("digits"), a directory, a ``.safetensors`` file, a hub id
            ("facebook/DiT-XL-2-256"), or what ``resolve`` made of one of them.
        dtype: of the network, a torch dtype or its name.
        device: where it runs; CUDA where there is one, else the CPU.
        allow_pickle: also take pickled ``.bin`` weights (read with ``weights_only=True``).
        timestep_embedding: "auto", "diffusers" or "original" (DiT only).
        classes: of a text-conditional model: names, or a mapping of each name to its prompt or
            prompts (with location tokens: to its phrase); where None, those that its directory
            states.
        templates: what makes a prompt of a name, with "{}" in its place; "a photo of a {}." if
            None. Of a model with location tokens one, with "{bbox}" in the place of the objects.
        average: of several prompts per class, "embedding" (the default) or "loss".
        variant: of the weights, such as "fp16"; parts that lack it are read in full precision, as
            all are if None. A part that has one variant only is read as that. Computed with is
            ``dtype``, whatever the variant.
        lora: LoRA weights that are fused into the weights of a text-to-image model: a file, a
            directory or a hub id, see ``files.lora.find_lora``. What was fitted to the model
            without them is not taken.
        lora_scale: what their differences are multiplied with, any number.
        prediction_type: of a single file, what its network predicts: "epsilon" or "v_prediction".
            None for what the file says, else what was published; a Stable Diffusion 2.x that does
            not say it needs it.

    Raises:
        ModelError: the source is unknown, broken, or of a family that is not supported; a
            text-conditional model without classes, or classes for another one; no part has the
            variant; LoRA weights that are broken, or another model's.
    """
    dtype, device = check_place(dtype, device)
    source = resolve(
        source, allow_pickle=allow_pickle, variant=variant, prediction_type=prediction_type
    )
    options: dict[str, Any] = {
        "allow_pickle": allow_pickle,
        "timestep_embedding": timestep_embedding,
    }
    prompts = {"classes": classes, "templates": templates, "average": average}
    if source.family.text:
        options.update(prompts, device=device)
    elif given := [key for key, value in prompts.items() if value is not None]:
        raise ModelError(
            f"{source} has classes of its own: {given[0]} is for text-conditional models."
        )
    if variant is not None:
        check_variant(source.directory, source.family.folders, variant)
        options["variant"] = variant
    if source.family.dtype:
        options["dtype"] = dtype
    if lora is not None:
        if not source.family.lora:
            raise without_lora(source)
        options["lora"] = find_lora(lora, lora_scale, allow_pickle=allow_pickle)
    elif lora_scale != 1.0:
        raise ModelError(f"lora_scale is of a lora, got {shown(lora_scale)} without one.")
    applied = options["lora"].file if lora is not None else None
    tell_what_is_not_applied(source.directory, source.family.folders, applied)
    with naming(source.text):
        loaded = source.family.loader(source.directory, name=source.text, **options)
        model = loaded.to(device, dtype)
    fitted = read_fitted(source.directory)
    if lora is None:
        apply_fitted(model, fitted)
        return model
    model.lora = options["lora"]
    if fitted != Fitted():
        log.warning(
            "what was fitted to %s is not taken with a LoRA, as it was fitted without: dive-fast "
            "fit --out, or load_fitted(%r), --fitted %s if it shall be taken.",
            source,
            str(source.directory),
            source.directory,
        )
    return model


def check_place(
    dtype: torch.dtype | str, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    """Precision and device as ``load_model`` takes them, for those who fetch a model before.

    Raises:
        ModelError: an unknown precision, or a device that cannot be used.
    """
    return _as_dtype(dtype), usable_device(device)


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ModelError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}.")
    return chosen


def usable_device(device: torch.device | str | None) -> torch.device:
    """A device as ``load_model`` takes it; None is cuda where there is one.

    Raises:
        ModelError: it cannot be used.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {device!r} cannot be used: {first_line(error)}") from error
    return chosen
