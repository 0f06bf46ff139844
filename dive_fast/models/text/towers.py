"""Prompts to embeddings, as diffusers' Stable Diffusion pipelines compute them (CLIP).

transformers is imported where it is used: only text-conditional models need it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from dive_fast.core.config import Config
from dive_fast.core.distinct import without_row
from dive_fast.core.memory import check_table
from dive_fast.errors import ModelError, shown
from dive_fast.models.files.checkpoint import load_component
from dive_fast.models.files.reading import first_line, read_config
from dive_fast.models.files.tensors import Entry
from dive_fast.models.text.encoders import (
    TransformersLibrary,
    import_transformers,
    quiet_transformers,
)
from dive_fast.models.text.prompts import ClassPrompts

log = logging.getLogger(__name__)

ENCODE_BATCH = 32  # prompts
TOKEN_BATCH = 4096  # prompts; the tokenizer takes many at once as fast as a few
SUFFIXES = ("", "_2")  # of the folders tokenizer and text_encoder
MIN_LENGTH = 3  # tokens of a prompt: start, a word, end
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
PREFIX = "text_model."
POSITIONS = "embeddings.position_ids"  # 0, 1, 2 ...


class TextTower(NamedTuple):
    """A CLIP tokenizer with its text encoder, and how many tokens a prompt is padded to."""

    tokenizer: Any
    encoder: torch.nn.Module
    length: int


class PromptEncoder:
    """Prompts to flat conditions [N, D].

    Args:
        towers: one (SD 1.x and 2.x: the last hidden state), or two (SDXL: the last but one hidden
            state of each, side by side, and the projected pooled state of the second).

    Attributes:
        shape: (L, width) of the sequence of embeddings.
        pooled: width of the pooled embedding, which follows the sequence; 0 without one.
    """

    def __init__(self, towers: Sequence[TextTower]) -> None:
        self.towers = tuple(towers)
        widths = [tower.encoder.config.hidden_size for tower in self.towers]
        self.shape = (self.towers[0].length, sum(widths))
        last = self.towers[-1].encoder.config
        self.pooled = last.projection_dim if len(self.towers) > 1 else 0

    @property
    def dim(self) -> int:
        return self.shape[0] * self.shape[1] + self.pooled

    @property
    def limit(self) -> int:
        """Tokens of a prompt that are read, its start and its end among them."""
        return self.towers[0].length

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The text encoders, for ``identity``."""
        return tuple(tower.encoder for tower in self.towers)

    def check(self, classes: ClassPrompts) -> None:
        """Warns of prompts that are cut.

        Raises:
            ModelError: two classes of different names have the same tokens, so that nothing can
                tell them apart. Of equal names ``ClassPrompts.make`` has warned.
        """
        limit = self.limit
        seen: dict[tuple, tuple[str, str]] = {}
        cut = []
        for row, (name, full) in enumerate(
            zip(classes.names, self._token_ids(classes), strict=True)
        ):
            if max(map(len, full)) > limit:
                cut.append(f"{name!r} ({max(map(len, full))} tokens)")
            key = tuple(tuple(ids[: limit - 1]) for ids in full)
            other, plain = seen.setdefault(key, (name, without_row(name, row)))
            if plain != without_row(name, row):
                raise ModelError(
                    f"the classes {other!r} and {name!r} have the same prompts as the text "
                    f"encoder reads them (lower case, {limit} tokens)."
                )
        if cut:
            listed = ", ".join(cut[:5]) + (f" and {len(cut) - 5} more" if len(cut) > 5 else "")
            log.warning(
                "prompts are cut to the %d tokens of the text encoder, for the classes %s.",
                limit,
                listed,
            )

    def _token_ids(self, classes: ClassPrompts) -> Iterator[list[list[int]]]:
        """The first tower's tokens of each class's prompts, not cut; many prompts at a time."""
        prompts = (prompt for group in classes.prompts for prompt in group)
        batches = iter(lambda: list(islice(prompts, TOKEN_BATCH)), [])
        ids = chain.from_iterable(
            self.towers[0].tokenizer(batch, verbose=False).input_ids for batch in batches
        )
        for group in classes.prompts:
            yield list(islice(ids, len(group)))

    def twins(self, prompts: Sequence[str], table: torch.Tensor) -> tuple[int, int] | None:
        """The first two prompts of the same tokens, as far as they are read; None if all differ.

        Args:
            table: of the prompts' conditions, which the tokens make unnecessary here.
        """
        seen: dict[tuple[int, ...], int] = {}
        ids = self.towers[0].tokenizer(list(prompts), verbose=False).input_ids
        for number, found in enumerate(ids):
            first = seen.setdefault(tuple(found[: self.limit - 1]), number)
            if first != number:
                return first, number
        return None

    def table(
        self, classes: ClassPrompts, device: torch.device, twins: bool = False
    ) -> torch.Tensor:
        """The conditions of all classes, float32 [C, parts * D] on the CPU.

        Shows a bar on a terminal, where it takes longer than a second.

        Args:
            twins: classes of the same tokens are allowed, which ``check`` refuses.

        Raises:
            ModelError: there is no memory for so many.
        """
        prompts = [prompt for group in classes.prompts for prompt in group]
        counts = torch.tensor([len(group) for group in classes.prompts])
        if classes.average == "loss":
            row, n_rows = torch.arange(len(prompts)), len(prompts)
            weight = torch.ones(len(prompts))
        else:
            row, n_rows = torch.arange(len(counts)).repeat_interleave(counts), len(counts)
            weight = (1 / counts)[row]
        check_table(n_rows, self.dim, torch.float32.itemsize, len(classes.names))
        table = torch.zeros(n_rows, self.dim)
        different, which = _different(prompts)
        users = which.argsort(stable=True).split(which.bincount().tolist())
        with self._towers_on(device), encoding_bar(len(different)) as bar:
            for numbers in torch.arange(len(different)).split(ENCODE_BATCH):
                first, last = int(numbers[0]), int(numbers[-1])
                encoded = self._encode(different[first : last + 1])
                # As many rows at a time as were encoded, however many share a prompt.
                for ids in torch.cat(users[first : last + 1]).split(ENCODE_BATCH):
                    table.index_add_(0, row[ids], encoded[which[ids] - first] * weight[ids, None])
                bar.update(len(numbers))
        return table.view(len(classes.names), -1)

    def encode(self, prompts: Sequence[str], device: torch.device) -> torch.Tensor:
        """The conditions of prompts, float32 [N, D] on the CPU."""
        with self._towers_on(device):
            return self._encode(prompts)

    def pooled_states(self, prompts: Sequence[str], device: torch.device) -> torch.Tensor:
        """The first tower's state at each prompt's end, as GLIGEN takes it, float32 [N, width].

        On the CPU; not projected.
        """
        tower, states = self.towers[0], []
        different, which = _different(prompts)
        with self._towers_on(device), encoding_bar(len(different)) as bar:
            for start in range(0, len(different), ENCODE_BATCH):
                batch = different[start : start + ENCODE_BATCH]
                tokens = tower.tokenizer(
                    batch,
                    padding=True,
                    max_length=tower.length,
                    truncation=True,
                    return_tensors="pt",
                ).to(tower.encoder.device)
                with torch.inference_mode():
                    found = tower.encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
                    states.append(found.pooler_output)
                bar.update(len(batch))
        return torch.cat(states).float().cpu()[which].clone()

    def _encode(self, prompts: Sequence[str]) -> torch.Tensor:
        states, pooled = [], []
        for tower in self.towers:
            encoder = tower.encoder
            tokens = tower.tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tower.length,
                truncation=True,
                return_tensors="pt",
            ).to(encoder.device)
            with torch.inference_mode():
                if len(self.towers) == 1:
                    # The rare encoders that were trained with a mask of the padding say so.
                    masked = getattr(encoder.config, "use_attention_mask", False)
                    mask = tokens.attention_mask if masked else None
                    states.append(encoder(tokens.input_ids, attention_mask=mask)[0])
                else:
                    output = encoder(tokens.input_ids, output_hidden_states=True)
                    states.append(output.hidden_states[-2])
                    # The last tower's projected one is used, the others' are not.
                    pooled = [output[0]]
        flat = torch.cat([torch.cat(states, dim=2).flatten(1), *pooled], dim=1)
        # Cloned outside inference mode: conditions meet autograd later.
        return flat.float().cpu().clone()

    @contextmanager
    def _towers_on(self, device: torch.device) -> Iterator[None]:
        """The encoders lie on the CPU and visit the device: they run once per set of classes."""
        for tower in self.towers:
            tower.encoder.to(device)
        try:
            yield
        finally:
            for tower in self.towers:
                tower.encoder.to("cpu")


def _different(prompts: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """The prompts without repetitions, and which of them each one is, int64 [N]."""
    number: dict[str, int] = {}
    which = [number.setdefault(prompt, len(number)) for prompt in prompts]
    return list(number), torch.tensor(which, dtype=torch.int64)


def encoding_bar(n_prompts: int) -> tqdm:
    """Not where stderr is a file or a pipe, and not for what is done in a second."""
    return tqdm(total=n_prompts, disable=None, delay=1, leave=False, unit="prompt", desc="encode")


def load_tower(
    directory: Path,
    suffix: str,
    class_name: str,
    allow_pickle: bool,
    variant: str | None = None,
) -> TextTower:
    """``tokenizer`` and ``text_encoder`` of a model directory.

    Args:
        suffix: "" or "_2".
        class_name: of the encoder, "CLIPTextModel" or "CLIPTextModelWithProjection".
        variant: see ``find_weights``.

    Raises:
        ModelError: transformers is not installed, or a part is missing or broken.
    """
    transformers = import_transformers()
    tokenizer = _load_tokenizer(transformers, directory / f"tokenizer{suffix}")
    encoder = load_component(
        getattr(transformers, class_name),
        directory / f"text_encoder{suffix}",
        allow_pickle,
        variant=variant,
        library=_Clip(),
    )
    config = encoder.config
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer{suffix} in {directory} has {len(tokenizer)} tokens, but its text "
            f"encoder knows {config.vocab_size}."
        )
    # Without a tokenizer_config.json the tokenizer knows no limit.
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return TextTower(tokenizer, encoder, int(length))


def _load_tokenizer(transformers: Any, folder: Path) -> Any:
    if not folder.is_dir():
        raise ModelError(f"expected the folder {folder.name} in {folder.parent}, found none.")
    # transformers makes an empty tokenizer where it finds no files.
    pair = [folder / "vocab.json", folder / "merges.txt"]
    if not (folder / "tokenizer.json").exists() and not all(path.exists() for path in pair):
        raise ModelError(f"expected vocab.json and merges.txt (or tokenizer.json) in {folder}.")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            _check_tokens(read_config(folder / name))
    try:
        with quiet_transformers(transformers):
            return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ModelError(
            f"{folder} cannot be loaded as CLIPTokenizer: {first_line(error)}"
        ) from error


def _check_tokens(config: Config) -> None:
    """Of what states the tokens that a tokenizer adds, and how many a prompt may have."""
    # transformers writes 1e30 where there is no limit.
    config.number("model_max_length", None, at_least=MIN_LENGTH)
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.content.get(key)
        if isinstance(token, Mapping):
            Config(f"{key} in {config.where}", token).text("content")
        else:
            config.text(key, None)


class _Clip(TransformersLibrary):
    """CLIP's text encoders."""

    def check_config(self, model_class: type, config: Config) -> None:
        kind = config.content.get("model_type")
        if kind != "clip_text_model":
            raise ModelError(f"expected the model_type clip_text_model, got {shown(kind)}.")
        for key in ("num_hidden_layers", *_SIZES):
            config.whole(key, None, at_least=int(key in _SIZES))
        for key in ("initializer_range", "initializer_factor"):
            config.number(key, None, at_least=0)
        config.number("layer_norm_eps", None, at_least=0, at_most=0.1)
        config.number("attention_dropout", None, at_least=0, at_most=1)
        config.text("hidden_act", None)
        config.whole("eos_token_id", None, at_least=0)
        # Missing ones have a default; null would be met in the first forward.
        for key in ("layer_norm_eps", "eos_token_id", "hidden_act", "num_hidden_layers", *_SIZES):
            if key in config.content and config.content[key] is None:
                raise ModelError(f"{key} in {config.where} must be stated, got null.")

    def named(self, model: torch.nn.Module, entries: dict[str, Entry]) -> dict[str, Entry]:
        # transformers 4 and 5 save the text encoder with and without this prefix.
        names = {name.removeprefix(PREFIX): name for name in model.state_dict()}
        return {names.get(n.removeprefix(PREFIX), n): entry for n, entry in entries.items()}

    def ignored(self, model: torch.nn.Module, name: str) -> bool:
        # A constant that older versions saved, and that published checkpoints carry.
        return name.endswith(POSITIONS)
