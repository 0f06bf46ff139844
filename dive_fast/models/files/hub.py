"""Where a model's files are: in the zoo, in a directory, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from dive_fast import zoo
from dive_fast.errors import ModelError, shown
from dive_fast.models.files.beside import tell_of
from dive_fast.models.files.reading import first_line, read_json
from dive_fast.models.files.sidecar import FILE
from dive_fast.models.files.weights import (
    STEMS,
    check_among,
    is_index,
    variants,
    wanted_weights,
)

TOP_FILES = ["model_index.json", FILE, "generation_config.json"]
TEXTS = (".json", ".txt", ".model", ".jinja")  # sentencepiece's models; templates of a chat
SHARD = "-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]"
HUB_ID = r"[\w.-]+/[\w.-]+"
# Weights that lie beside config.json, where a repository holds one component.
STEM_FILES = [f"{stem}.safetensors" for stem in STEMS["safetensors"]]

# The folders of a pipeline that are read, by its model_index.json; None for all.
FoldersOf = Callable[[dict[str, Any]], Sequence[str] | None]


def find(
    source: str, folders_of: FoldersOf, allow_pickle: bool, variant: str | None = None
) -> Path:
    """The directory of a model, downloaded if it is a hub id.

    Raises:
        ModelError: it is neither in the zoo nor a directory nor on the hub.
    """
    if source in zoo.names():
        return zoo.path(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise ModelError(f"expected a model directory, got the file {source}.")
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, nobody's home
        raise ModelError(f"{shown(source)} cannot be a directory: {first_line(error)}") from error
    if not re.fullmatch(HUB_ID, source):
        raise ModelError(
            f"unknown model {shown(source)}: expected a model of the zoo "
            f"({', '.join(zoo.names())}), a directory that exists, or a hub id like "
            f"facebook/DiT-XL-2-256."
        )
    return download(source, folders_of, allow_pickle, variant)


def find_part(source: str, folder: str, others: Sequence[str] = ()) -> Path:
    """The folder of one component, by itself or within a model; fetched if it is on the hub.

    Args:
        source: a directory or a hub id, of the component or of a model that has it in ``folder``.
        others: files of which one is enough in ``source``, where there is no ``config.json``; of
            the hub safetensors only.

    Raises:
        ModelError: there is none.
    """
    directory = Path(source).expanduser()
    if not directory.is_dir():
        if directory.exists() or not re.fullmatch(HUB_ID, source):
            raise ModelError(
                f"expected the directory or hub id of a {folder}, got {shown(source)}."
            )
        safe = [name for name in others if name.endswith(".safetensors")]
        directory = _snapshot(source, [*patterns([folder]), "config.json", *STEM_FILES, *safe])
    for found in (directory, directory / folder):
        if (found / "config.json").is_file():
            return found
    if any((directory / name).is_file() for name in others):
        return directory
    nor = f", nor any of {', '.join(others)}" if others else ""
    raise ModelError(f"expected config.json in {source} or its folder {folder}, found none{nor}.")


def _snapshot(hub_id: str, allowed: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(allowed)))
    except Exception as error:  # the hub, the network and the disk each raise their own kinds
        raise ModelError(
            f"{hub_id} is no directory here and could not be fetched from the hub: "
            f"{first_line(error)}"
        ) from error


def download(
    hub_id: str, folders_of: FoldersOf, allow_pickle: bool, variant: str | None = None
) -> Path:
    """Fetches what is read of a model: one set of weights per folder, no single-file checkpoint.

    Weights are fetched in the variant that ``find_weights`` would choose. Pickles are fetched, if
    allowed, for folders without safetensors only.

    Raises:
        ModelError: it cannot be fetched, its family is not supported, or it has no such variant.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        # The family decides what else is needed, and whether anything is.
        index = hf_hub_download(hub_id, "model_index.json")
        folders = folders_of(read_json(Path(index)))
        listing = _listing(hub_id)
        if listing is None:
            allowed = patterns(folders, variant, allow_pickle)
        else:
            allowed = [escape(f) for f in wanted(listing, folders, variant, allow_pickle, hub_id)]
        return Path(snapshot_download(hub_id, allow_patterns=allowed))
    except ModelError:
        raise
    except Exception as error:  # the hub, the network and the disk each raise their own kinds
        raise ModelError(
            f"{hub_id} is no directory here and could not be fetched from the hub: "
            f"{first_line(error)}"
        ) from error


def wanted(
    listing: Sequence[str],
    folders: Sequence[str] | None,
    variant: str | None,
    allow_pickle: bool,
    where: object,
) -> list[str]:
    """Of a repository's files those to fetch: configurations, tokenizers and weights.

    Raises:
        ModelError: the variant is not there, or as ``find_weights``.
    """
    read = [file for file in listing if _is_read(file, folders)]
    # Of the weights beside it, perhaps: their reader says.
    tell_of([file for file in read if not file.endswith("/adapter_config.json")], where)
    by_folder: dict[str, list[str]] = {}
    for file in listing:
        folder, slash, name = file.partition("/")
        if slash and "/" not in name and (folders is None or folder in folders):
            by_folder.setdefault(folder, []).append(name)
    if variant is not None:
        check_among({v for names in by_folder.values() for v in variants(names)}, variant, where)
    found = [file for file in listing if file in TOP_FILES]
    for folder, names in by_folder.items():
        texts = [n for n in names if n.endswith(TEXTS)]
        # The index of another set would make two of them.
        texts = [n for n in texts if not is_index(n)]
        weights = wanted_weights(names, variant, allow_pickle, f"{where}/{folder}")
        found += [f"{folder}/{name}" for name in (*texts, *weights)]
    return found


def patterns(
    folders: Sequence[str] | None, variant: str | None = None, allow_pickle: bool = False
) -> list[str]:
    """The same as ``fnmatch`` patterns, for a repository whose files nobody could list."""
    ends = ["", SHARD]
    if variant is not None:
        ends += [f".{variant}", f".{variant}{SHARD}", f"{SHARD}.{variant}"]
    kinds = ("safetensors", "bin") if allow_pickle else ("safetensors",)
    names = [f"{stem}{end}.{kind}" for kind in kinds for stem in STEMS[kind] for end in ends]
    names = [*(f"*{end}" for end in TEXTS), *names]
    return TOP_FILES + [f"{folder}/{name}" for folder in folders or ["*"] for name in names]


def _listing(hub_id: str) -> list[str] | None:
    """The repository's files; None where the hub cannot be asked, but has been asked before."""
    from huggingface_hub import list_repo_files

    try:
        return list(list_repo_files(hub_id))
    except Exception:  # what was fetched before is used, as ``snapshot_download`` does
        return None


def _is_read(file: str, folders: Sequence[str] | None) -> bool:
    """Whether it lies beside the model, or in a folder that is read."""
    folder, slash, _ = file.partition("/")
    return not slash or folders is None or folder in folders
