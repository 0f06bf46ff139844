"""What tests do to the files of a component's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import read_json, write_json

STEM = "diffusion_pytorch_model"


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def shard(
    folder: Path,
    n: int = 2,
    *,
    stem: str = STEM,
    suffix: str = "safetensors",
    variant: str | None = None,
    legacy: bool = False,
    keep: bool = False,
) -> list[Path]:
    """Writes the weights in a folder as n shards with their index; the single file goes."""
    single = folder / f"{stem}.safetensors"
    weights = load_file(single)
    names = sorted(weights)
    end = "" if variant is None else f".{variant}"
    before, after = ("", end) if legacy else (end, "")
    paths, where = [], {}
    for i in range(n):
        path = folder / f"{stem}{before}-{i + 1:05d}-of-{n:05d}{after}.{suffix}"
        part = {name: weights[name] for name in names[i::n]}
        save_file(part, path) if suffix == "safetensors" else torch.save(part, path)
        where |= dict.fromkeys(part, path.name)
        paths.append(path)
    content = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}.{suffix}.index{end}.json").write_text(json.dumps(content))
    if not keep:
        single.unlink()
    return paths


def to_variant(
    folder: Path, variant: str = "fp16", *, stem: str = STEM, keep: bool = False
) -> Path:
    """Writes the weights in half precision as a variant; those in full precision go."""
    single = folder / f"{stem}.safetensors"
    path = folder / f"{stem}.{variant}.safetensors"
    save_file({name: value.half() for name, value in load_file(single).items()}, path)
    if not keep:
        single.unlink()
    return path


def write_header(path: Path, header: object, content: bytes = b"", length: int | None = None):
    """A safetensors file of this header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + content)


def changed(source: Path, target: Path, file: str, **values: Any) -> Path:
    """A copy in which a JSON file states these values."""
    directory = copied(source, target)
    path = directory / file
    write_json(path, (read_json(path) if path.exists() else {}) | values)
    return directory
