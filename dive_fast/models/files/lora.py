"""Which file of LoRA weights is meant: one that is named, the one of a directory, or of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.core.numbers import is_number
from dive_fast.errors import ModelError, shown, some
from dive_fast.models.files.reading import first_line
from dive_fast.models.files.tensors import PickledTensors, SafeTensors
from dive_fast.models.files.weights import WeightSet

USUAL = "pytorch_lora_weights"  # as diffusers calls the file
SAFE, PICKLED = (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+\.\w+))?")


@dataclass(frozen=True)
class Lora:
    """LoRA weights that are to be fused into a model.

    Attributes:
        name: the file's, or the hub id: not where it lies.
        file: that holds them, whole and with weights of LoRA layers.
        scale: what their differences are multiplied with.
    """

    name: str
    file: Path
    scale: float = 1.0

    @property
    def is_pickled(self) -> bool:
        return self.file.suffix not in SAFE

    def facts(self) -> dict[str, Any]:
        """For a model's ``identity``."""
        return {"lora": self.name, "lora_scale": self.scale}


def find_lora(lora: object, scale: object = 1.0, *, allow_pickle: bool = False) -> Lora:
    """The LoRA weights that are meant, fetched if they are on the hub.

    Args:
        lora: a file; a directory with one file of weights, or with diffusers'
            ``pytorch_lora_weights`` among them; a hub id of such a repository, or a hub id
            followed by the file, "someone/many-loras/one.safetensors".
        scale: any number.
        allow_pickle: also take pickled weights, where there are no others.

    Raises:
        ModelError: there is no such file, it is damaged or holds no LoRA, there are several, the
            scale is no number, or peft is not installed.
    """
    if not is_number(scale):
        raise ModelError(f"lora_scale must be a number, got {shown(scale)}.")
    if not isinstance(lora, str | Path) or not str(lora):
        raise ModelError(
            f"expected LoRA weights as a file, a directory or a hub id, got {shown(lora)}."
        )
    name, file = _located(str(lora), allow_pickle)
    _check(file, allow_pickle)
    import_peft()
    return Lora(name, file, float(scale))


def import_peft() -> Any:
    """The module.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            "LoRA weights need peft, which is not installed: pip install 'dive_fast[lora]'."
        ) from error
    return peft


def _located(text: str, allow_pickle: bool) -> tuple[str, Path]:
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            names = [p.name for p in path.iterdir() if p.is_file()]
            path = path / _chosen(names, allow_pickle, path)
            return path.name, path
        if path.exists():
            return path.name, path
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{shown(text)} cannot be read: {error.strerror}.") from error
    except (ValueError, RuntimeError) as error:  # a zero byte, nobody's home
        raise ModelError(f"{shown(text)} cannot be a file: {first_line(error)}") from error
    match = _HUB_ID.fullmatch(text)
    if match is None or path.suffix in (*SAFE, *PICKLED) and match[2] is None:
        raise ModelError(
            f"expected LoRA weights as a file or directory that exists or a hub id, "
            f"got {shown(text)}."
        )
    return text, _fetched(match[1], match[2], allow_pickle)


def _fetched(hub_id: str, file: str | None, allow_pickle: bool) -> Path:
    """One file of the hub; what was fetched before where the hub cannot be asked."""
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download

    try:
        if file is None:
            try:
                names = [name for name in list_repo_files(hub_id) if "/" not in name]
            except Exception:  # as ``hub.download``: no network, but perhaps a copy
                place = Path(snapshot_download(hub_id, local_files_only=True))
                names = [path.name for path in place.iterdir() if path.is_file()]
            file = _chosen(names, allow_pickle, hub_id)
        return Path(hf_hub_download(hub_id, file))
    except ModelError:
        raise
    except Exception as error:  # the hub, the network and the disk each raise their own kinds
        raise ModelError(
            f"the LoRA {hub_id} is no file or directory here and could not be fetched from the "
            f"hub: {first_line(error)}"
        ) from error


def _chosen(names: Iterable[str], allow_pickle: bool, where: object) -> str:
    """The one file of LoRA weights among the names of a directory's files."""
    names = sorted(names)
    safe = [name for name in names if name.endswith(SAFE)]
    pickled = [name for name in names if name.endswith(PICKLED)]
    found = safe or (pickled if allow_pickle else [])
    if len(found) > 1:
        found = [name for name in found if Path(name).stem == USUAL] or found
    if len(found) > 1:
        raise ModelError(
            f"expected one file of LoRA weights in {where}, got {some(found)}: name the file."
        )
    if not found and pickled:
        raise ModelError(_refusal(f"{where} holds pickled LoRA weights only ({pickled[0]})"))
    if not found:
        raise ModelError(f"expected LoRA weights (.safetensors) in {where}, found none.")
    return found[0]


def _check(file: Path, allow_pickle: bool) -> None:
    """That it is whole, may be read, and holds layers of a LoRA."""
    if file.suffix not in (*SAFE, *PICKLED):
        raise ModelError(f"expected LoRA weights in a .safetensors file, got {file}.")
    if file.suffix in PICKLED and not allow_pickle:
        raise ModelError(_refusal(f"{file} holds pickled LoRA weights"))
    kind = SafeTensors if file.suffix in SAFE else PickledTensors
    try:
        keys = list(kind(file.parent, WeightSet([file.name])).entries)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # pickle, zip and torch raise their own kinds
        raise ModelError(f"{file} is truncated or damaged: {first_line(error)}") from error
    if not any(re.search("lora|lokr", key) for key in keys):
        first = f", the first of its {len(keys)} keys is {keys[0]}" if keys else ""
        raise ModelError(f"expected LoRA weights in {file}, got none{first}.")
    # diffusers leaves these out, and what is left means something else.
    if dora := [key for key in keys if "dora_scale" in key]:
        raise ModelError(f"{file} is a DoRA ({dora[0]}), which is not supported: expected a LoRA.")


def _refusal(what: str) -> str:
    return f"{what}, which are refused unless asked for (allow_pickle=True, --allow-pickle)."
