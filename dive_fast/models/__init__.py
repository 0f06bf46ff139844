"""Model families: the only home of diffusers' internals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dive_fast import zoo
from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import first_line, read_json
from dive_fast.models.files.hub import find
from dive_fast.models.files.sidecar import apply_fitted, read_fitted
from dive_fast.models.protocol import Model
from dive_fast.models.text.prompts import Classes, stored_classes

PRIOR = "prior"  # the folder of a model directory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Loader = Callable[..., Model]


@dataclass(frozen=True)
class _Family:
    """How the models of one pipeline class are read.

    Attributes:
        loader: see ``register_model_family``.
        folders: those of the pipeline that it reads; None for all.
        text: its classes are prompts.
    """

    loader: Loader
    folders: tuple[str, ...] | None = None
    text: bool = False


def _load_dit(directory: Path, **options) -> Model:
    from dive_fast.models.dit import model as dit

    return dit.load(directory, **options)


def _load_stable_diffusion(directory: Path, **options) -> Model:
    from dive_fast.models import gligen, stable_diffusion
    from dive_fast.models.geodiffusion import model as geodiffusion
    from dive_fast.models.geodiffusion.prompts import has_location_tokens
    from dive_fast.models.gligen_support import is_gligen

    # Both are published as ordinary pipelines: a gated UNet and a tokenizer tell them apart.
    if is_gligen(directory):
        return gligen.load(directory, **options)
    family = geodiffusion if has_location_tokens(directory) else stable_diffusion
    return family.load(directory, **options)


def _load_gligen(directory: Path, **options) -> Model:
    from dive_fast.models import gligen

    return gligen.load(directory, **options)


def _load_layout(directory: Path, **options) -> Model:
    from dive_fast.models.layout_to_image import unet as layout

    return layout.load(directory, **options)


_STABLE_DIFFUSION = _Family(
    _load_stable_diffusion,
    ("unet", "vae", "scheduler", "tokenizer", "text_encoder"),
    text=True,
)
_SDXL = _Family(
    _load_stable_diffusion,
    (*_STABLE_DIFFUSION.folders, "tokenizer_2", "text_encoder_2"),
    text=True,
)
_FAMILIES: dict[str, _Family] = {
    "DiTPipeline": _Family(_load_dit, ("transformer", "vae", "scheduler")),
    "LayoutToImagePipeline": _Family(
        _load_layout, ("unet", "layout_encoder", "vae", "scheduler", PRIOR)
    ),
    "StableDiffusionGLIGENPipeline": _Family(_load_gligen, _STABLE_DIFFUSION.folders, text=True),
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": _STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
}


def register_model_family(pipeline_class: str, loader: Loader, *, text: bool = False) -> None:
    """Makes ``from_pretrained`` read another family.

    Args:
        pipeline_class: the ``_class_name`` in ``model_index.json`` that picks it.
        loader: called as ``loader(directory, name=..., allow_pickle=..., timestep_embedding=...)``,
            returns a ``Model``.
        text: the classes are prompts; the loader is then also called with ``classes``,
            ``templates`` and ``average`` as ``load_model`` got them, and the ``device`` on which
            to encode them.
    """
    _FAMILIES[pipeline_class] = _Family(loader, text=text)


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    timestep_embedding: str = "auto",
    classes: Classes | None = None,
    templates: Sequence[str] | None = None,
    average: str | None = None,
) -> Model:
    """A model of the zoo, of a diffusers directory, or of the hub, frozen and in place.

    Args:
        source: a zoo name ("digits"), a directory, or a hub id ("facebook/DiT-XL-2-256").
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

    Raises:
        ModelError: the source is unknown, broken, or of a family that is not supported; a
            text-conditional model without classes, or classes for another one.
    """
    dtype, device = _as_dtype(dtype), _as_device(device)
    directory, family = _find(source, allow_pickle)
    options: dict[str, Any] = {
        "allow_pickle": allow_pickle,
        "timestep_embedding": timestep_embedding,
    }
    prompts = {"classes": classes, "templates": templates, "average": average}
    if family.text:
        options.update(prompts, device=device)
    elif given := [key for key, value in prompts.items() if value is not None]:
        raise ModelError(
            f"{source} has classes of its own: {given[0]} is for text-conditional models."
        )
    model = family.loader(directory, name=str(source), **options).to(device, dtype)
    apply_fitted(model, read_fitted(directory))
    return model


def needs_classes(source: str | Path, *, allow_pickle: bool = False) -> bool:
    """Whether ``load_model`` can read this source only if it is given ``classes``.

    Raises:
        ModelError: the source is unknown, or of a family that is not supported.
    """
    directory, family = _find(source, allow_pickle)
    return family.text and stored_classes(directory) is None


def prior_directory(source: str | Path, *, allow_pickle: bool = False) -> Path | None:
    """Where the prior over layouts lies that belongs to a model of ``load_model``; None without.

    Raises:
        ModelError: the source is unknown, or of a family that is not supported.
    """
    directory, _ = _find(source, allow_pickle)
    # A training that is under way has no configuration yet.
    return directory / PRIOR if (directory / PRIOR / "config.json").is_file() else None


def _find(source: str | Path, allow_pickle: bool) -> tuple[Path, _Family]:
    directory = find(str(source), lambda index: _family(index, source).folders, allow_pickle)
    index = read_json(directory / "model_index.json")
    return directory, _family(index, directory / "model_index.json")


def _family(index: dict[str, Any], where: str | Path) -> _Family:
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ModelError(
            f"the _class_name in {where} is {name!r}, which is not supported; supported are "
            f"{', '.join(sorted(_FAMILIES))}."
        )
    return _FAMILIES[name]


def own_directory(source: str | Path) -> Path | None:
    """The directory that ``load_model`` reads, where it is the user's; None for zoo and hub."""
    path = Path(source).expanduser()
    return path if str(source) not in zoo.names() and path.is_dir() else None


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ModelError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}.")
    return chosen


def _as_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {device!r} cannot be used: {first_line(error)}") from error
    return chosen
