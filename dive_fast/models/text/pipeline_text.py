"""Prompts to conditions by a diffusers pipeline's own ``encode_prompt``.

What a family does with its tokenizers (templates, cut layers, masks) is written there; here it is
only read from the directory, called, and packed into rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.core.condition import ConditionParts
from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import first_line, load_component
from dive_fast.models.text.encoders import (
    TransformersLibrary,
    import_transformers,
    quiet_transformers,
)
from dive_fast.models.text.prompts import ClassPrompts

ENCODE_BATCH = 8  # prompts

# (pipeline, prompts, device) to the parts of their conditions, each [N, ...].
Encode = Callable[[Any, list[str], torch.device], Mapping[str, Tensor]]


class PipelineText:
    """The text half of a pipeline; the same interface as ``towers.PromptEncoder``.

    Args:
        pipeline: a diffusers pipeline whose tokenizers and text encoders are there; its network and
            its VAE need not be.
        encode: calls ``encode_prompt`` and names what it gives.
        constants: the parts that are not optimised.

    Attributes:
        parts: what a condition is made of.
    """

    pooled = 0  # the parts say it all

    def __init__(self, pipeline: Any, encode: Encode, constants: Collection[str] = ()) -> None:
        self.pipeline = pipeline
        self._encode_prompts = encode
        self.encoders: tuple[nn.Module, ...] = tuple(
            part
            for name in pipeline.config
            if name.startswith("text_encoder") and (part := getattr(pipeline, name)) is not None
        )
        self.parts = ConditionParts.of(self._encode([""], torch.device("cpu")), constants)

    @property
    def dim(self) -> int:
        return self.parts.dim

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def modules(self) -> tuple[nn.Module, ...]:
        """The text encoders, for ``identity``."""
        return self.encoders

    def check(self, classes: ClassPrompts) -> None:
        """That no two classes have the same prompts.

        Raises:
            ModelError: two have.
        """
        seen: dict[tuple[str, ...], str] = {}
        for name, prompts in zip(classes.names, classes.prompts, strict=True):
            if prompts in seen:
                raise ModelError(
                    f"the classes {seen[prompts]!r} and {name!r} have the same prompts."
                )
            seen[prompts] = name

    def table(self, classes: ClassPrompts, device: torch.device) -> Tensor:
        """The conditions of all classes, float32 [C, parts * D] on the CPU."""
        texts = [prompt for group in classes.prompts for prompt in group]
        rows = self.encode(texts, device)
        if classes.average == "loss":
            table = rows.view(len(classes.names), -1)
        else:
            groups = rows.split([len(group) for group in classes.prompts])
            table = torch.stack([group.mean(dim=0) for group in groups])
        _refuse_twins(classes.names, table)
        return table

    def encode(
        self, prompts: Sequence[str], device: torch.device, encode: Encode | None = None
    ) -> Tensor:
        """The conditions of prompts, float32 [N, D] on the CPU; another ``encode`` may be said."""
        for encoder in self.encoders:
            encoder.to(device)
        try:
            found = [
                self.parts.pack(
                    self._encode(list(prompts[i : i + ENCODE_BATCH]), device, encode)
                ).cpu()
                for i in range(0, len(prompts), ENCODE_BATCH)
            ]
        finally:
            for encoder in self.encoders:
                encoder.to("cpu")
        return torch.cat(found)

    def _encode(
        self, prompts: list[str], device: torch.device, encode: Encode | None = None
    ) -> Mapping[str, Tensor]:
        encode = self._encode_prompts if encode is None else encode
        try:
            with torch.no_grad():
                return encode(self.pipeline, prompts, device)
        except (ModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever tokenizers and encoders that do not fit raise
            raise ModelError(
                f"the tokenizers and text encoders cannot be used by {type(self.pipeline).__name__}"
                f": {first_line(error)}"
            ) from error


def _refuse_twins(names: Sequence[str], table: Tensor) -> None:
    """That no two rows are the same; a batch of another size may differ by its rounding.

    Raises:
        ModelError: two are, as of prompts that differ in what the tokenizer ignores or cuts off.
    """
    order = table.double().sum(dim=1).argsort().tolist()
    for i, j in pairwise(order):
        if torch.allclose(table[i], table[j], rtol=1e-5, atol=1e-6):
            first, second = sorted((i, j))
            raise ModelError(
                f"the prompts of the classes {names[first]!r} and {names[second]!r} are the same "
                f"to the model's tokenizers."
            )


def load_encoders(
    directory: Path,
    index: Mapping[str, Any],
    allow_pickle: bool,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Tokenizers and text encoders of a directory by their folders; None for those left out.

    Args:
        dtype: of the network beside them; see ``TransformersLibrary.dtype`` for theirs.

    Raises:
        ModelError: one is missing or broken, or transformers does not have its class.
    """
    transformers = import_transformers()
    found: dict[str, Any] = {}
    for folder, entry in index.items():
        if not folder.startswith(("tokenizer", "text_encoder")):
            continue
        if not (isinstance(entry, list) and len(entry) == 2):
            raise ModelError(
                f"expected {folder} in {directory / 'model_index.json'} as a library and a class, "
                f"got {entry!r}."
            )
        if entry[1] is None:  # published without it, as SD3 without T5
            found[folder] = None
            continue
        kind = getattr(transformers, str(entry[1]), None)
        if not isinstance(kind, type):
            raise ModelError(
                f"expected a class of transformers for {folder} in "
                f"{directory / 'model_index.json'}, got {entry[1]!r}."
            )
        if folder.startswith("tokenizer"):
            found[folder] = _load_tokenizer(kind, directory / folder)
        else:
            found[folder] = load_component(
                kind,
                directory / folder,
                allow_pickle,
                variant=variant,
                library=TransformersLibrary(),
                dtype=dtype,
            )
    _check_tokens(found, directory)
    return found


def _check_tokens(found: Mapping[str, Any], directory: Path) -> None:
    for folder, tokenizer in found.items():
        encoder = found.get(folder.replace("tokenizer", "text_encoder"))
        if not folder.startswith("tokenizer") or tokenizer is None or encoder is None:
            continue
        known = getattr(encoder.config, "vocab_size", len(tokenizer))
        if len(tokenizer) > known:
            raise ModelError(
                f"the {folder} in {directory} has {len(tokenizer)} tokens, but its text encoder "
                f"knows {known}."
            )


def _load_tokenizer(kind: type, folder: Path) -> Any:
    if not folder.is_dir():
        raise ModelError(f"expected the folder {folder.name} in {folder.parent}, found none.")
    _check_vocabulary(kind, folder)
    try:
        with quiet_transformers(import_transformers()):
            return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ModelError(
            f"{folder} cannot be loaded as {kind.__name__}: {first_line(error)}"
        ) from error


def _check_vocabulary(kind: type, folder: Path) -> None:
    """That a tokenizer's files are there: without them one is made that knows no word."""
    names = set(getattr(kind, "vocab_files_names", {}).values())
    ways = [way for way in (names & {"tokenizer.json"}, names - {"tokenizer.json"}) if way]
    if ways and not any(all((folder / name).is_file() for name in way) for way in ways):
        expected = ", or ".join(" and ".join(sorted(way)) for way in ways)
        raise ModelError(f"expected {expected} in {folder}, found none.")
