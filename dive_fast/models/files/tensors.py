"""What files of weights hold: names, shapes and types first, and their values when those fit.

The header of a safetensors file is read without its content, so that a configuration can be
compared with it before anything is allocated.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dive_fast.errors import ModelError
from dive_fast.models.files.reading import first_line, read_json
from dive_fast.models.files.weights import WeightSet

MAX_HEADER = 16 << 20  # bytes; published checkpoints have 0.3 MB at most
FLOATS = {"F64", "F32", "F16", "BF16"}
PIECE = 4 << 20  # bytes that are read at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        shape: its sides.
        dtype: as safetensors writes it, "F32".
        file: where it is.
        key: what it is called there.
        start: its first byte in a safetensors file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    key: str
    start: int = 0


class SafeTensors:
    """The safetensors files of one set.

    Attributes:
        entries: by name.

    Raises:
        ModelError: a file is empty, truncated or damaged, or the index says something else.
    """

    def __init__(self, directory: Path, weights: WeightSet) -> None:
        self.entries = _gathered(directory, weights, _safe_entries)

    def fill(self, entry: Entry, target: Tensor) -> None:
        """Copies the values of an entry into a tensor of its shape, piece by piece.

        Read, not mapped: pages that are mapped count as the process's memory beside the result.

        Raises:
            ModelError: the file has been cut off since, or holds a type that torch has not.
        """
        if entry.dtype not in DTYPES:
            raise ModelError(
                f"expected weights of {', '.join(DTYPES)} in {entry.file}, got {entry.key} of "
                f"{entry.dtype}."
            )
        kind, flat = DTYPES[entry.dtype], target.contiguous().view(-1)
        buffer = memoryview(bytearray(min(PIECE, max(1, target.numel()) * kind.itemsize)))
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            for piece in flat.split(PIECE // kind.itemsize):
                if piece.numel() == 0:  # torch cannot view nothing
                    continue
                content = buffer[: piece.numel() * kind.itemsize]
                if file.readinto(content) != len(content):
                    raise ModelError(f"{entry.file} is truncated or damaged: {entry.key} ends it.")
                piece.copy_(torch.frombuffer(content, dtype=kind))
        if not target.is_contiguous():
            target.copy_(flat.view_as(target))


class PickledTensors:
    """The pickled files of one set, which are read with ``weights_only=True``.

    Attributes:
        entries: by name.

    Raises:
        ModelError: a file is empty or holds something else than tensors, or the index says
            something else. What torch raises of a damaged one is let through.
    """

    def __init__(self, directory: Path, weights: WeightSet) -> None:
        self._content: dict[Path, dict[str, torch.Tensor]] = {}
        self.entries = _gathered(directory, weights, self._read)

    def fill(self, entry: Entry, target: Tensor) -> None:
        """Copies the values of an entry into a tensor of its shape."""
        target.copy_(self._content[entry.file][entry.key])

    def _read(self, path: Path) -> dict[str, Entry]:
        if path.stat().st_size == 0:
            raise ModelError(f"expected weights in {path}, got an empty file (0 bytes).")
        # The older format cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(content, dict):
            raise ModelError(f"{path} must hold tensors by name, got {type(content).__name__}.")
        entries = {}
        for name, value in content.items():
            if not (isinstance(name, str) and _is_dense(value)):
                kind = type(value).__name__
                raise ModelError(f"{path} must hold dense tensors by name, got {kind} as {name!r}.")
            dtype = _FLOATS.get(value.dtype, str(value.dtype).removeprefix("torch."))
            entries[name] = Entry(tuple(value.shape), dtype, path, name)
        self._content[path] = content
        return entries


def _is_dense(value: Any) -> bool:
    """Whether it is a tensor whose numbers are all in the file, none of them many times."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


def _safe_entries(path: Path) -> dict[str, Entry]:
    header, start = _header(path)
    try:
        # The offsets, and that they are those of these shapes and types, are checked here.
        with safe_open(path, framework="pt") as content:
            names = list(content.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is truncated or damaged: {first_line(error)}") from error
    return {
        name: Entry(
            tuple(header[name]["shape"]),
            header[name]["dtype"],
            path,
            name,
            start + header[name]["data_offsets"][0],
        )
        for name in names
    }


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON at the head of the file, and the byte after it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a name stands there twice")
        return content

    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ModelError(f"expected weights in {path}, got an empty file (0 bytes).")
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(
                    f"{path} is truncated or damaged: its header should have {length} bytes, but "
                    f"the file has {size}."
                )
            if length > MAX_HEADER:
                raise ModelError(
                    f"{path} has a header of {length} bytes, expected at most {MAX_HEADER}: no "
                    f"model that is supported has so many weights."
                )
            header = json.loads(file.read(length), object_pairs_hook=unique)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is truncated or damaged: {first_line(error)}") from error
    return header, 8 + length


def _gathered(directory: Path, weights: WeightSet, read: Any) -> dict[str, Entry]:
    """The entries of all files, which an index, where there is one, must name alike."""
    per_file = {name: read(directory / name) for name in weights.files}
    if weights.index is not None:
        _check_index(directory / weights.index, per_file)
    return {name: entry for entries in per_file.values() for name, entry in entries.items()}


def _check_index(path: Path, per_file: dict[str, dict[str, Entry]]) -> None:
    stated = read_json(path).get("weight_map")
    if not isinstance(stated, dict) or not all(isinstance(name, str) for name in stated.values()):
        raise ModelError(f"weight_map in {path} must map weights to the files that hold them.")
    if unknown := sorted(set(stated.values()) - set(per_file)):
        raise ModelError(
            f"{path} names the file {unknown[0]!r}, expected {' and '.join(_ends(list(per_file)))}."
        )
    if unnamed := sorted(set(per_file) - set(stated.values())):
        raise ModelError(f"{path} does not name the file {unnamed[0]}, which lies beside it.")
    held = {(name, file) for file, entries in per_file.items() for name in entries}
    if missing := sorted(set(stated.items()) - held):
        raise ModelError(
            f"{path} says that {missing[0][0]} is in {missing[0][1]}, where it is not."
        )
    if surplus := sorted(held - set(stated.items())):
        raise ModelError(f"{path} does not say that {surplus[0][0]} is in {surplus[0][1]}.")


def _ends(names: Sequence[str]) -> Sequence[str]:
    return names if len(names) < 3 else (names[0], names[-1])
