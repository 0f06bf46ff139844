"""Where a model's files are: in the zoo, in a directory, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dive_fast import zoo
from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import first_line, read_json
from dive_fast.models.files.sidecar import FILE

TOP_FILES = ["model_index.json", FILE, "generation_config.json"]
SHARD = "-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]"
SAFE_WEIGHTS = ["diffusion_pytorch_model", "model"]
PICKLED_WEIGHTS = ["diffusion_pytorch_model", "pytorch_model"]

# The folders of a pipeline that are read, by its model_index.json; None for all.
FoldersOf = Callable[[dict[str, Any]], Sequence[str] | None]


def find(source: str, folders_of: FoldersOf, allow_pickle: bool) -> Path:
    """The directory of a model, downloaded if it is a hub id.

    Raises:
        ModelError: it is neither in the zoo nor a directory nor on the hub.
    """
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
    return download(source, folders_of, allow_pickle)


def download(hub_id: str, folders_of: FoldersOf, allow_pickle: bool) -> Path:
    """Fetches what is read of a model: no other precision, no single-file checkpoint.

    Pickles are fetched, if allowed, for folders without safetensors only.

    Raises:
        ModelError: it cannot be fetched, or its family is not supported.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        # The family decides what else is needed, and whether anything is.
        index = hf_hub_download(hub_id, "model_index.json")
        folders = folders_of(read_json(Path(index)))
        directory = Path(snapshot_download(hub_id, allow_patterns=patterns(folders)))
        bare = _without_weights(directory, folders)
        if allow_pickle and bare:
            snapshot_download(hub_id, allow_patterns=pickle_patterns(bare))
        return directory
    except ModelError:
        raise
    except Exception as error:  # the hub, the network and the disk each raise their own kinds
        raise ModelError(
            f"{hub_id} is no directory here and could not be fetched from the hub: "
            f"{first_line(error)}"
        ) from error


def patterns(folders: Sequence[str] | None) -> list[str]:
    """What to fetch, as ``fnmatch`` patterns: configurations, tokenizers and safetensors."""
    names = [f"{name}{shard}.safetensors" for name in SAFE_WEIGHTS for shard in ("", SHARD)]
    return TOP_FILES + [
        f"{folder}/{name}" for folder in folders or ["*"] for name in ("*.json", "*.txt", *names)
    ]


def pickle_patterns(folders: Sequence[str]) -> list[str]:
    """The pickled weights of these folders."""
    names = [f"{name}{shard}.bin" for name in PICKLED_WEIGHTS for shard in ("", SHARD)]
    return [f"{folder}/{name}" for folder in folders for name in names]


def _without_weights(directory: Path, folders: Sequence[str] | None) -> list[str]:
    """The folders that hold no safetensors: pickled ones, and those that have no weights at all."""
    if folders is None:
        folders = [path.parent.name for path in directory.glob("*/*.json")]
    return [f for f in dict.fromkeys(folders) if not any((directory / f).glob("*.safetensors"))]
