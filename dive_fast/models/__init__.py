"""Model families: the only home of diffusers' internals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from dive_fast import zoo
from dive_fast.errors import ModelError
from dive_fast.models.checkpoint import first_line, read_json
from dive_fast.models.protocol import Model

HUB_FILES = ["*.json", "*.txt", "*.safetensors"]
HUB_PICKLES = ["*.bin"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Loader = Callable[..., Model]


def _load_dit(directory: Path, **options) -> Model:
    from dive_fast.models import dit

    return dit.load(directory, **options)


_FAMILIES: dict[str, Loader] = {"DiTPipeline": _load_dit}


def register_model_family(pipeline_class: str, loader: Loader) -> None:
    """Makes ``from_pretrained`` read another family.

    Args:
        pipeline_class: the ``_class_name`` in ``model_index.json`` that picks it.
        loader: called as ``loader(directory, name=..., allow_pickle=..., timestep_embedding=...)``,
            returns a ``Model``.
    """
    _FAMILIES[pipeline_class] = loader


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    timestep_embedding: str = "auto",
) -> Model:
    """A model of the zoo, of a diffusers directory, or of the hub, frozen and in place.

    Args:
        source: a zoo name ("digits"), a directory, or a hub id ("facebook/DiT-XL-2-256").
        dtype: of the network, a torch dtype or its name.
        device: where it runs; CUDA where there is one, else the CPU.
        allow_pickle: also take pickled ``.bin`` weights (read with ``weights_only=True``).
        timestep_embedding: "auto", "diffusers" or "original" (DiT only).

    Raises:
        ModelError: the source is unknown, broken, or of a family that is not supported.
    """
    dtype, device = _as_dtype(dtype), _as_device(device)
    directory = _find(str(source), allow_pickle)
    index = read_json(directory / "model_index.json")
    family = index.get("_class_name")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ModelError(
            f"the _class_name in {directory / 'model_index.json'} is {family!r}, which is not "
            f"supported; supported are {', '.join(sorted(_FAMILIES))}."
        )
    model = _FAMILIES[family](
        directory,
        name=str(source),
        allow_pickle=allow_pickle,
        timestep_embedding=timestep_embedding,
    )
    return model.to(device, dtype)


def own_directory(source: str | Path) -> Path | None:
    """The directory that ``load_model`` reads, where it is the user's; None for zoo and hub."""
    path = Path(source).expanduser()
    return path if str(source) not in zoo.names() and path.is_dir() else None


def _find(source: str, allow_pickle: bool) -> Path:
    if source in zoo.names():
        return zoo.path(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"expected a model directory, got the file {source}.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ModelError(
            f"unknown model {source!r}: expected a model of the zoo ({', '.join(zoo.names())}), "
            f"a directory that exists, or a hub id like facebook/DiT-XL-2-256."
        )
    return _download(source, allow_pickle)


def _download(hub_id: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = HUB_FILES + (HUB_PICKLES if allow_pickle else [])
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub, the network and the disk each raise their own kinds
        raise ModelError(
            f"{hub_id} is no directory here and could not be fetched from the hub: "
            f"{first_line(error)}"
        ) from error


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
