"""Prompts to embeddings, as diffusers' Stable Diffusion pipelines compute them (CLIP).

transformers is imported where it is used: only text-conditional models need it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dive_fast.core.distinct import without_row
from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import first_line, load_component, read_json
from dive_fast.models.text.prompts import ClassPrompts

log = logging.getLogger(__name__)

ENCODE_BATCH = 32  # prompts
SUFFIXES = ("", "_2")  # of the folders tokenizer and text_encoder


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

    def check(self, classes: ClassPrompts) -> None:
        """Warns of prompts that are cut.

        Raises:
            ModelError: two classes of different names have the same tokens, so that nothing can
                tell them apart. Of equal names ``ClassPrompts.make`` has warned.
        """
        limit, tokenizer = self.towers[0].length, self.towers[0].tokenizer
        seen: dict[tuple, tuple[str, str]] = {}
        cut = []
        for row, (name, prompts) in enumerate(zip(classes.names, classes.prompts, strict=True)):
            full = tokenizer(list(prompts), verbose=False).input_ids
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

    def table(self, classes: ClassPrompts, device: torch.device) -> torch.Tensor:
        """The conditions of all classes, float32 [C, parts * D] on the CPU."""
        prompts = [prompt for group in classes.prompts for prompt in group]
        counts = torch.tensor([len(group) for group in classes.prompts])
        if classes.average == "loss":
            row, n_rows = torch.arange(len(prompts)), len(prompts)
            weight = torch.ones(len(prompts))
        else:
            row, n_rows = torch.arange(len(counts)).repeat_interleave(counts), len(counts)
            weight = (1 / counts)[row]
        table = torch.zeros(n_rows, self.dim)
        with self._towers_on(device):
            for ids in torch.arange(len(prompts)).split(ENCODE_BATCH):
                encoded = self._encode([prompts[i] for i in ids.tolist()])
                table.index_add_(0, row[ids], encoded * weight[ids, None])
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
        with self._towers_on(device):
            for start in range(0, len(prompts), ENCODE_BATCH):
                tokens = tower.tokenizer(
                    list(prompts[start : start + ENCODE_BATCH]),
                    padding=True,
                    max_length=tower.length,
                    truncation=True,
                    return_tensors="pt",
                ).to(tower.encoder.device)
                with torch.inference_mode():
                    found = tower.encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
                    states.append(found.pooler_output)
        return torch.cat(states).float().cpu().clone()

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


def load_tower(directory: Path, suffix: str, class_name: str, allow_pickle: bool) -> TextTower:
    """``tokenizer`` and ``text_encoder`` of a model directory.

    Args:
        suffix: "" or "_2".
        class_name: of the encoder, "CLIPTextModel" or "CLIPTextModelWithProjection".

    Raises:
        ModelError: transformers is not installed, or a part is missing or broken.
    """
    transformers = import_transformers()
    tokenizer = _load_tokenizer(transformers, directory / f"tokenizer{suffix}")
    folder = directory / f"text_encoder{suffix}"
    encoder = load_component(
        getattr(transformers, class_name),
        folder,
        allow_pickle,
        read=_read_transformers,
        safe_name="model",
        pickle_name="pytorch_model",
    )
    config = encoder.config
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer{suffix} in {directory} has {len(tokenizer)} tokens, but its text "
            f"encoder knows {config.vocab_size}."
        )
    # Without a tokenizer_config.json the tokenizer knows no limit.
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return TextTower(tokenizer, encoder, length)


def import_transformers() -> Any:
    """The module.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "text-conditional models need transformers, which is not installed: "
            "pip install 'dive_fast[text]'."
        ) from error
    return transformers


def _load_tokenizer(transformers: Any, folder: Path) -> Any:
    if not folder.is_dir():
        raise ModelError(f"expected the folder {folder.name} in {folder.parent}, found none.")
    # transformers makes an empty tokenizer where it finds no files.
    pair = [folder / "vocab.json", folder / "merges.txt"]
    if not (folder / "tokenizer.json").exists() and not all(path.exists() for path in pair):
        raise ModelError(f"expected vocab.json and merges.txt (or tokenizer.json) in {folder}.")
    try:
        with _quiet_transformers(transformers):
            return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ModelError(
            f"{folder} cannot be loaded as CLIPTokenizer: {first_line(error)}"
        ) from error


def _read_transformers(
    model_class: type, directory: Path, safe: bool
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A ``PreTrainedModel``; see ``checkpoint.Reader``."""
    kind = read_json(directory / "config.json").get("model_type")
    if kind != "clip_text_model":
        raise ModelError(f"expected the model_type clip_text_model, got {kind!r}.")
    with _quiet_transformers(import_transformers()):
        model, report = model_class.from_pretrained(
            directory,
            use_safetensors=safe,
            weights_only=True,
            output_loading_info=True,
            # Reported below by name; transformers itself only says that there are some.
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    for name, found, expected in report["mismatched_keys"]:
        raise ModelError(f"size mismatch for {name}: {list(found)}, expected {list(expected)}.")
    # A constant that older versions saved, and that published checkpoints carry.
    surplus = [k for k in report["unexpected_keys"] if not k.endswith("embeddings.position_ids")]
    # Half precision is read as such by newer versions.
    return model.float(), {"missing_keys": report["missing_keys"], "unexpected_keys": surplus}


@contextmanager
def _quiet_transformers(transformers: Any) -> Iterator[None]:
    """No bars for each little file, and no report of what becomes one sentence."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
