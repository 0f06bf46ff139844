"""A checkpoint in one file, as the original code writes it, made a diffusers directory once.

The conversion is diffusers' own, as are the configurations, which it takes from the hub: the file
states none. diffusers leaves random what it does not find in the file; here that is refused.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dive_fast.errors import ModelError
from dive_fast.models.files.reading import first_line
from dive_fast.models.files.tensors import Entry, SafeTensors
from dive_fast.models.files.weights import WeightSet
from dive_fast.models.lora import digest, quiet
from dive_fast.models.text.encoders import import_transformers

# diffusers' names for the kinds of checkpoints, and the pipelines of them. SD 2.x is left out: two
# of its checkpoints differ in what they predict and in nothing that the file would say.
PIPELINES = {"v1": "StableDiffusionPipeline", "xl_base": "StableDiffusionXLPipeline"}
NETWORK, AVERAGES = "model.diffusion_model.", "model_ema."
_NEEDED = (f"{NETWORK}input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight")
# Keys with which a few checkpoints say that they are of another schedule than their kind.
_OTHERS = ("v_pred", "ztsnr", "edm_mean", "edm_vpred.sigma_max")
_OPTIONS = {
    "StableDiffusionPipeline": {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}


def as_directory(file: Path) -> Path:
    """The diffusers directory of a single-file checkpoint, from the cache or converted into it.

    Raises:
        ModelError: the file is damaged, of a kind that is not supported or not whole, its
            configuration cannot be fetched, or the directory cannot be written.
    """
    tensors = SafeTensors(file.parent, WeightSet([file.name]))
    kind = _kind(file, tensors.entries)
    try:
        directory = _place(file)
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            _convert(file, tensors, kind, directory)
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    # Of the disk; safetensors has its own kind for a full one, and there may be no home.
    except Exception as error:
        raise ModelError(
            f"{file} cannot be converted into the cache: {first_line(error)}"
        ) from error
    return directory


def _kind(file: Path, entries: dict[str, Entry]) -> str:
    """The pipeline's class, by the names and shapes of the weights."""
    import_transformers()
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    expected = f"expected a checkpoint of {' or '.join(PIPELINES.values())} in {file}"
    if missing := [key for key in _NEEDED if key not in entries]:
        lora = any("lora" in key for key in entries)
        hint = "; it holds LoRA weights, which are given as lora=, --lora" if lora else ""
        raise ModelError(f"{expected}, but it has no {missing[0]}{hint}.")
    if other := [key for key in _OTHERS if key in entries]:
        raise ModelError(f"{expected} as published, but it has the schedule of {other[0]!r}.")
    kind = infer_diffusers_model_type(entries)
    if kind not in PIPELINES:
        raise ModelError(f"{expected}, got one of the kind {kind!r}: convert it by diffusers.")
    return PIPELINES[kind]


def _place(file: Path) -> Path:
    """Where the directory of this very file lies, or will."""
    import diffusers

    status = file.stat()
    with file.open("rb") as opened:
        header = opened.read(8 + int.from_bytes(opened.read(8), "little"))
    said = f"{status.st_size} {status.st_mtime_ns} {diffusers.__version__} {file.resolve()} "
    name = hashlib.sha256(said.encode() + header).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dive_fast" / "single_file" / name


def _convert(file: Path, tensors: SafeTensors, kind: str, directory: Path) -> None:
    import diffusers

    try:
        with quiet():
            pipeline = getattr(diffusers, kind).from_single_file(str(file), **_OPTIONS[kind])
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the hub, diffusers and torch each raise their own kinds
        raise ModelError(
            f"{file} cannot be converted to a {kind}, for which its configuration is fetched from "
            f"the hub: {first_line(error)}"
        ) from error
    _check_whole(file, tensors, pipeline)
    # Whole or not at all: the directory gets its name when everything is in it.
    made = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        with quiet():
            pipeline.save_pretrained(made)
        if not directory.is_dir():
            made.rename(directory)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check_whole(file: Path, tensors: SafeTensors, pipeline: Any) -> None:
    """That all weights come from the file, and that all of the network's went into them.

    Raises:
        ModelError: they do not, and which one.
    """
    # Counted: weights of zeros or ones are alike, and a part may be made with such.
    given: Counter[bytes] = Counter()
    network: dict[str, bytes] = {}
    for name, entry in tensors.entries.items():
        if name.startswith(AVERAGES):
            continue
        value = torch.empty(entry.shape)
        tensors.fill(entry, value)
        given.update(map(digest, _forms(name, value)))
        if name.startswith(NETWORK):
            network[name] = digest(value)
    taken = set()
    for part, module in pipeline.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for name, value in module.state_dict().items():
            key = None if value.is_meta else digest(value)
            if key is None or not given[key]:
                raise ModelError(f"{file} is not whole: it lacks {name} of the {part}.")
            given[key] -= 1
            taken.add(key)
    if unused := [name for name, key in network.items() if key not in taken]:
        raise ModelError(
            f"{file} holds more than a {type(pipeline).__name__}, which has no place for "
            f"{unused[0]}."
        )


def _forms(name: str, value: Tensor) -> Iterable[Tensor]:
    """What becomes of a weight: as a rule itself; OpenCLIP has some in another form."""
    if name.endswith(("in_proj_weight", "in_proj_bias")):
        return value.chunk(3)  # query, key and value
    return [value.T if name.endswith("text_projection") else value]
