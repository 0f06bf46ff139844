"""The state dict in a file of ``torch.save``, and nothing else of it: no code that it holds runs.

Checkpoints of training frameworks also hold hyper-parameters, optimizers and callbacks, which are
objects of any class. Here every class and function that is not needed for weights is replaced by a
stand-in that takes whatever it is given and does nothing. Tensors are read only where the state
dict has them, after their sizes were compared with what the file holds.
"""

from __future__ import annotations

import builtins
import io
import logging
import math
import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.core.numbers import is_whole

log = logging.getLogger(__name__)

ZIP_START = b"PK\x03\x04"
_NAMED = 5  # of the kinds that are skipped

_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
# A file with calls of these was made to do harm, or is of no training that we know.
_HARMFUL = {"nt", "os", "posix", "runpy", "shutil", "socket", "subprocess", "sys", "importlib"}


class CheckpointError(Exception):
    """What is wrong with the file, as the end of a sentence."""


class _Inert(type):
    """A stand-in is a class that is called, filled and built without an effect.

    Instances would not do: a pickle may make a class by a call, and an object of that class.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.harmful:
            raise CheckpointError(f"it holds the object {cls.__name__}, and only weights are read.")
        return cls

    def __setitem__(cls, key: Any, value: Any) -> None:
        pass


class _Skipped(metaclass=_Inert):
    harmful = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    @classmethod
    def _take(cls, *args: Any) -> None:
        pass

    __setstate__ = append = extend = add = _take


class _Storage(NamedTuple):
    """A storage that is not read yet."""

    key: str
    dtype: torch.dtype
    numel: int


class _Lazy(NamedTuple):
    """A tensor that is not read yet."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Rebuild(NamedTuple):
    """torch._utils' function of that name, for tensors that are not read yet."""

    name: str

    def __call__(self, *args: Any) -> Any:
        match self.name:
            case "_rebuild_parameter" | "_rebuild_parameter_with_state":
                return args[0]
            case "_rebuild_from_type_v2":
                function, _, inner, _ = args
                return function(*inner)
            case "_rebuild_tensor_v3":
                storage, offset, size, stride, _, _, dtype, *_ = args
                n = storage.numel // dtype.itemsize
                return _Lazy(_Storage(storage.key, dtype, n), offset, size, stride)
        return _Lazy(*args[:4])


_REBUILT = {
    ("torch._utils", name): _Rebuild(name)
    for name in (
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
    )
} | {("torch._tensor", "_rebuild_from_type_v2"): _Rebuild("_rebuild_from_type_v2")}


# In Python: the C one reserves as much memory as a file claims that it needs.
class _WeightsUnpickler(pickle._Unpickler):
    """Of all objects it makes dicts, lists, numbers, texts, and tensors that are not read yet.

    Attributes:
        skipped: the full names of all else, in the order of the file.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012 - the base class has it so
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[_code[0]]  # registered classes would pass find_class by

    def _load_bytearray8(self) -> None:
        (n,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(n)))  # not more than there is

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray8

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.skipped: dict[str, _Inert] = {}

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # written with the names of Python 2
            renamed = IMPORT_MAPPING.get(module, module), name
            module, name = NAME_MAPPING.get((module, name), renamed)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in _REBUILT:
            return _REBUILT[module, name]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self._stand_in(module, name)

    def _stand_in(self, module: str, name: str) -> _Inert:
        built_in = module == "builtins"
        full = name if built_in else f"{module}.{name}"
        # A file may name its classes as it likes, and they are printed.
        full = full.encode("unicode_escape").decode()[:100]
        if full not in self.skipped:
            # Of Python's own functions training frameworks call getattr alone, for inner classes.
            harmless = name == "getattr" or isinstance(getattr(builtins, name, None), type)
            harmful = not harmless if built_in else module.split(".")[0] in _HARMFUL
            self.skipped[full] = _Inert(full, (_Skipped,), {"harmful": harmful})
        return self.skipped[full]

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            return _Skipped
        return _Storage(key, dtype, numel)


def read_state_dict(path: Path) -> Any:
    """What ``torch.save`` wrote under "state_dict", or all of it, with its tensors on the CPU.

    Logs which kinds of objects were skipped.

    Raises:
        CheckpointError: the file is damaged, or says what cannot be true.
        Exception: what zipfile and pickle raise of other files.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise CheckpointError("it is truncated: its table of contents is missing.") from error
    with archive:
        reader = _Reader(archive, path.stat().st_size)
        unpickler = _WeightsUnpickler(reader.record("data.pkl"))
        state = state_dict_of(unpickler.load())
        if isinstance(state, Mapping):
            state = {
                k: reader.tensor(v, k) if isinstance(v, _Lazy) else v for k, v in state.items()
            }
    if unpickler.skipped:
        names = list(unpickler.skipped)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        log.warning(
            "%s holds hyper-parameters (%s%s), which are skipped",
            path, ", ".join(names[:_NAMED]), more,
        )  # fmt: skip
    return state


def state_dict_of(content: Any) -> Any:
    """The entry of that name, or the whole of a checkpoint that has none."""
    return content.get("state_dict", content) if isinstance(content, Mapping) else content


def kind_of(value: Any) -> str:
    """The name of its class, also of what was skipped."""
    return value.__name__ if isinstance(value, _Inert) else type(value).__name__


class _Reader:
    """The records of a file of ``torch.save``."""

    def __init__(self, archive: zipfile.ZipFile, n_bytes: int) -> None:
        self._archive, self._n_bytes = archive, n_bytes
        names = archive.namelist()
        self._folder = names[0].split("/")[0] if names else ""
        self._read: dict[str, Tensor] = {}
        if f"{self._folder}/byteorder" in names:
            order = self.record("byteorder").decode()
            if order != sys.byteorder:
                raise CheckpointError(
                    f"its numbers are {order}-endian, not {sys.byteorder}-endian."
                )

    def record(self, name: str) -> bytes:
        return self._archive.read(self._info(name))

    def _info(self, name: str) -> zipfile.ZipInfo:
        try:
            info = self._archive.getinfo(f"{self._folder}/{name}")
        except KeyError as error:
            raise CheckpointError(f"it has no {name}, which torch.save writes.") from error
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        # torch.save does not compress: what a record states is what it takes in the file.
        if not stored or info.header_offset + info.file_size > self._n_bytes:
            raise CheckpointError(
                f"its record {name} states {info.file_size} bytes, which are not in the file."
            )
        return info

    def tensor(self, lazy: _Lazy, name: str) -> Tensor:
        """Reads the storage if it was not read yet."""
        storage, offset, size, stride = lazy
        if not isinstance(storage, _Storage):
            raise CheckpointError(f"{name} is of a kind of storage that is not read.")
        sizes = [*size, *stride, offset, storage.numel]
        if len(size) != len(stride) or not all(is_whole(n, 0) for n in sizes):
            raise CheckpointError(f"{name} states a size that is none.")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        n_values = math.prod(size)
        if n_values and (last >= storage.numel or n_values > storage.numel):
            raise CheckpointError(
                f"{name} states {n_values} values, and its storage has {storage.numel}."
            )
        return self._flat(storage, name).as_strided(tuple(size), tuple(stride), offset)

    def _flat(self, storage: _Storage, name: str) -> Tensor:
        key, dtype, numel = storage
        if not isinstance(key, str):
            raise CheckpointError(f"{name} names no record of the file.")
        if key not in self._read:
            info = self._info(f"data/{key}")
            n_bytes = numel * dtype.itemsize
            if n_bytes > info.file_size:
                raise CheckpointError(
                    f"{name} states {n_bytes} bytes, and the file has {info.file_size} of it."
                )
            values = bytearray(self._archive.read(info))
            self._read[key] = torch.frombuffer(values, dtype=torch.uint8) if values else None
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return self._read[key][: numel * dtype.itemsize].view(dtype)
