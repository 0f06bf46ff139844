"""Prompts to conditions by a diffusers pipeline's own ``encode_prompt``.

What a family does with its tokenizers (templates, cut layers, masks) is written there; here it is
only read from the directory, called, and packed into rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dive_fast.core.condition import ConditionParts
from dive_fast.core.memory import check_table
from dive_fast.core.vocabulary import float_blocks, is_large
from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import fingerprint, first_line, load_component
from dive_fast.models.text.encoders import (
    TransformersLibrary,
    import_transformers,
    quiet_transformers,
)
from dive_fast.models.text.prompt_cache import PromptCache, cache_directory
from dive_fast.models.text.prompts import ClassPrompts
from dive_fast.models.text.towers import encoding_bar

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
        files: digest of the tokenizers' files and the configurations; None where encoded prompts
            shall not be kept on the disk (see ``prompt_cache``).

    Attributes:
        parts: what a condition is made of.
    """

    pooled = 0  # the parts say it all

    def __init__(
        self,
        pipeline: Any,
        encode: Encode,
        constants: Collection[str] = (),
        files: str | None = None,
    ) -> None:
        self.pipeline = pipeline
        self._encode_prompts = encode
        self.encoders: tuple[nn.Module, ...] = tuple(
            part
            for name in pipeline.config
            if name.startswith("text_encoder") and (part := getattr(pipeline, name)) is not None
        )
        self._cache = PromptCache(*self._kept(files))
        first = next(self._encoded([""], torch.device("cpu"), encode))
        self.parts = ConditionParts.of(first, constants)

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

    def twins(self, prompts: Sequence[str], table: Tensor) -> tuple[int, int] | None:
        """Two prompts whose conditions are the same, in their order; None if all differ.

        Args:
            table: [N, D], the conditions: what the tokenizers ignore or cut off shows there only.
        """
        return _twins(table)

    def table(self, classes: ClassPrompts, device: torch.device, twins: bool = False) -> Tensor:
        """The conditions of all classes, [C, parts * D] on the CPU, with a bar on a terminal.

        float32; where that is large (``vocabulary.is_large``) float16, or bfloat16 if a number is
        beyond float16's range.

        Args:
            twins: classes may be the same to the tokenizers.

        Raises:
            ModelError: two classes are the same, or there is no memory for so many.
        """
        texts = [prompt for group in classes.prompts for prompt in group]
        counts = [len(group) for group in classes.prompts]
        if classes.average == "loss":
            counts = [1] * len(texts)
        dtype = torch.float16 if is_large(len(counts), self.dim) else torch.float32
        check_table(len(counts), self.dim, dtype.itemsize, len(classes.names))
        table = torch.empty(len(counts), self.dim, dtype=dtype)
        with encoding_bar(len(texts)) as bar, self._visiting(device):
            rows = self._rows(texts, device, self._encode_prompts)
            for number, count in enumerate(counts):
                row = next(rows)
                for _ in range(count - 1):
                    row = row + next(rows)
                row = row / count
                if table.dtype == torch.float16 and row.abs().max() > torch.finfo(dtype).max:
                    table = _in_bfloat16(table, number)
                table[number] = row
                bar.update(count)
        table = table.view(len(classes.names), -1)
        if not twins and (same := _twins(table)) is not None:
            first, second = (classes.names[row] for row in same)
            raise ModelError(
                f"the prompts of the classes {first!r} and {second!r} are the same to the model's "
                "tokenizers."
            )
        return table

    def encode(
        self, prompts: Sequence[str], device: torch.device, encode: Encode | None = None
    ) -> Tensor:
        """The conditions of prompts, float32 [N, D] on the CPU; another ``encode`` may be said."""
        encode = self._encode_prompts if encode is None else encode
        with self._visiting(device):
            return torch.stack(list(self._rows(prompts, device, encode)))

    @contextmanager
    def _visiting(self, device: torch.device) -> Iterator[None]:
        """The encoders go to the device when they first run, and come back to the CPU."""
        try:
            yield
        finally:
            for encoder in self.encoders:
                encoder.to("cpu")

    def _rows(
        self, prompts: Sequence[str], device: torch.device, encode: Encode
    ) -> Iterator[Tensor]:
        """The condition of one prompt after the other, float32 [D] on the CPU."""
        for parts in self._encoded(prompts, device, encode):
            yield self.parts.pack(parts)[0]

    def _encoded(
        self, prompts: Sequence[str], device: torch.device, encode: Encode
    ) -> Iterator[Mapping[str, Tensor]]:
        """The parts [1, ...] of one prompt after the other, on the CPU; what is kept is read."""
        way = f"{encode.__module__}.{encode.__qualname__}"
        for start in range(0, len(prompts), ENCODE_BATCH):
            batch = list(prompts[start : start + ENCODE_BATCH])
            found = {prompt: self._cache.read(way, prompt) for prompt in dict.fromkeys(batch)}
            if missing := [prompt for prompt, parts in found.items() if parts is None]:
                for encoder in self.encoders:
                    encoder.to(device)
                together = self._encode([*missing], device, encode)  # some change the list
                for number, prompt in enumerate(missing):
                    found[prompt] = {name: part[number] for name, part in together.items()}
                    self._cache.write(found[prompt], way, prompt)
            for prompt in batch:
                yield {name: part.cpu()[None] for name, part in found[prompt].items()}

    def _kept(self, files: str | None) -> tuple[dict[str, Any], Path | None]:
        """What an encoded prompt depends on beside its text, and where it lies."""
        directory = None if files is None else cache_directory()
        if directory is None:
            return {}, None
        network = getattr(self.pipeline, "transformer", None)
        return {
            "pipeline": type(self.pipeline).__name__,
            "files": files,
            "encoders": [fingerprint(encoder) for encoder in self.encoders],
            "dtypes": [str(part.dtype) for part in (*self.encoders, network) if part is not None],
            "versions": [diffusers.__version__, import_transformers().__version__],
        }, directory

    def _encode(
        self, prompts: list[str], device: torch.device, encode: Encode
    ) -> Mapping[str, Tensor]:
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


def _in_bfloat16(table: Tensor, n: int) -> Tensor:
    """The memory of a float16 table with its first n rows in bfloat16."""
    coarse = table.view(torch.bfloat16)
    for row in range(n):
        coarse[row] = table[row].to(torch.bfloat16)
    return coarse


def _twins(table: Tensor) -> tuple[int, int] | None:
    """Two rows that are the same; a batch of another size may differ by its rounding.

    They are of prompts that differ in what the tokenizer ignores or cuts off.
    """
    sums = torch.cat([block.sum(dim=1) for block in float_blocks(table)])
    # In half precision the rounding may fall on either side of a number.
    close = {"rtol": max(1e-5, torch.finfo(table.dtype).eps), "atol": 1e-6}
    for i, j in pairwise(sums.argsort().tolist()):
        if torch.allclose(table[i].float(), table[j].float(), **close):
            return min(i, j), max(i, j)
    return None


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
    _check_sentencepiece(folder)
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


def _check_sentencepiece(folder: Path) -> None:
    """That a sentencepiece model can be read, where no ``tokenizer.json`` says the same.

    transformers would ask for another library.
    """
    if (folder / "tokenizer.json").is_file() or not any(folder.glob("*.model")):
        return
    needed = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [name for module, name in needed.items() if not _is_there(module)]
    if missing:
        raise ModelError(
            f"the tokenizer in {folder} needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install 'dive_fast[text]'."
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False
