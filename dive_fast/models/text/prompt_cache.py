"""Encoded prompts on the disk: a large text encoder runs once per prompt, not once per process.

An entry is a safetensors file of a condition's parts, called by the digest of all that its values
depend on. It states the digest of its content: one that is damaged is no entry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dive_fast.core.files import CACHE_VARIABLE, cache_folder, replacing
from dive_fast.models.files.hub import TEXTS

log = logging.getLogger(__name__)

REVISION = 1  # of what this package makes of a prompt; a new one makes all entries old
_ORDER, _CONTENT = "order", "content"  # of the metadata: the names as they came; the digest


def cache_directory() -> Path | None:
    """Where encoded prompts lie; None where they are not kept: ``DIVE_FAST_CACHE`` is empty."""
    if os.environ.get(CACHE_VARIABLE) == "":
        return None
    folder = cache_folder()
    return None if folder is None else folder / "prompts"


class PromptCache:
    """Entries of one text half.

    Args:
        facts: all that its conditions depend on beside the prompt, for JSON.
        directory: see ``cache_directory``; None keeps nothing.
    """

    def __init__(self, facts: Mapping[str, Any], directory: Path | None) -> None:
        self._facts = {"revision": REVISION, **facts}
        self.directory = directory

    def path(self, *key: str) -> Path:
        """The file of a prompt, of which ``key`` is the text and how it is encoded."""
        text = json.dumps({**self._facts, "key": key}, sort_keys=True)
        return self.directory / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def read(self, *key: str) -> dict[str, Tensor] | None:
        """The parts [...] of a prompt's condition; None if there is no entry, or a damaged one."""
        if self.directory is None:
            return None
        path = self.path(*key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as content:
                stated = content.metadata()
                # Copied: a mapped file that is cut off later ends the process.
                parts = {
                    name: content.get_tensor(name).clone() for name in json.loads(stated[_ORDER])
                }
                whole = stated[_CONTENT] == _digest(parts)
        except Exception as error:  # safetensors, the disk and torch each raise their own kinds
            log.debug("%s is not read: %s", path, error)
            return None
        return parts if whole else None

    def write(self, parts: Mapping[str, Tensor], *key: str) -> None:
        """Keeps the parts [...]; where that cannot be done, a warning says so once."""
        if self.directory is None:
            return
        parts = {name: part.detach().cpu().contiguous().clone() for name, part in parts.items()}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with replacing(self.path(*key)) as file:
                stated = {_ORDER: json.dumps([*parts]), _CONTENT: _digest(parts)}
                file.write(save(parts, stated))
        except OSError as error:
            log.warning(
                "encoded prompts are not kept in %s: %s.", self.directory, error.strerror or error
            )
            self.directory = None


def digest_of_files(directory: Path, folders: list[str]) -> str:
    """Of tokenizers, templates and configurations: what stands in folders and is no weights."""
    digest = hashlib.sha256()
    for folder in sorted(folders):
        for path in sorted((directory / folder).glob("*")):
            if path.name.endswith(TEXTS) and path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{folder}/{path.name} {content}\n".encode())
    return digest.hexdigest()


def _digest(parts: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name} {part.dtype} {list(part.shape)}".encode())
        digest.update(part.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
