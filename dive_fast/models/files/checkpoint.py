"""Reading diffusers model directories: every way that one can be broken is one clear sentence."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dive_fast.core.config import Config
from dive_fast.core.distinct import told_apart
from dive_fast.core.numbers import is_whole
from dive_fast.errors import ModelError
from dive_fast.models.files.adapters import (
    Tensors,
    check_not_alone,
    tell_of_adapter,
    with_adapter,
)
from dive_fast.models.files.blueprint import build_within, check_fits, check_values
from dive_fast.models.files.materialise import weights_elsewhere, with_memory
from dive_fast.models.files.reading import first_line, read_config, read_json, root_cause
from dive_fast.models.files.tensors import Entry, PickledTensors, SafeTensors
from dive_fast.models.files.weights import find_weights

__all__ = ["fingerprint", "first_line", "load_component", "read_class_names", "read_json"]

WEIGHTS = "diffusion_pytorch_model"
AT_ONCE = 1 << 20  # numbers that are looked at for NaN
SUMMED = 1 << 22  # numbers that are summed in double precision


class Library:
    """How the components of diffusers are made and filled; ``text.towers`` has transformers'.

    Attributes:
        safe_stem, pickle_stem: of the weights' files.
    """

    safe_stem = pickle_stem = WEIGHTS

    def check_config(self, model_class: type, config: Config) -> None:
        """That the class can make something of these values, as far as their kinds tell."""
        check_values(model_class.__init__, config)

    def build(self, model_class: type, config: Mapping[str, Any]) -> torch.nn.Module:
        """On the device of the context."""
        with quiet_diffusers():
            return model_class.from_config(dict(config))

    def materialise(
        self,
        model_class: type,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        keep: Collection[str],
    ) -> torch.nn.Module:
        """A model in memory, to be filled; all but its weights is as in a new one.

        Args:
            dtype: of the weights; what is computed is in float32.
            keep: modules whose weights are in float32, see ``materialise.is_kept``.
        """
        # To fill billions of weights with random numbers first takes minutes.
        with weights_elsewhere(), torch.device("cpu"):
            model = self.build(model_class, config)
        return with_memory(model, dtype, keep)

    def dtype(self, entries: Mapping[str, Entry], asked: torch.dtype) -> torch.dtype:
        """The precision that weights of these entries get if ``asked`` is that of the network."""
        return asked

    def kept(self, model: torch.nn.Module, dtype: torch.dtype) -> Collection[str]:
        """Modules that stay in float32 by themselves where the others are of ``dtype``."""
        return ()

    def named(self, model: torch.nn.Module, entries: dict[str, Entry]) -> dict[str, Entry]:
        """The entries under the names that the model has for them today."""
        # Attention of VAEs up to diffusers 0.17; pops and sets keys only.
        return model._fix_state_dict_keys_on_load(dict(entries))

    def ignored(self, model: torch.nn.Module, name: str) -> bool:
        """Whether a weight that the model lacks may lie there."""
        patterns = model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in patterns)


DIFFUSERS = Library()


def load_component(
    model_class: type,
    directory: Path,
    allow_pickle: bool,
    *,
    variant: str | None = None,
    library: Library = DIFFUSERS,
    dtype: torch.dtype = torch.float32,
    keep: Collection[str] = (),
) -> torch.nn.Module:
    """One component of a pipeline, complete, finite and frozen.

    The weights' names and shapes are compared with the configuration before memory is taken. Then
    they are made in their precision and filled one after the other from safetensors: no more memory
    is taken than they need. An unfused LoRA adapter within them is fused, see ``adapters``.

    Args:
        model_class: its class.
        directory: the component's folder, with ``config.json`` and the weights.
        allow_pickle: also take ``.bin`` weights (read with ``weights_only=True``).
        variant: see ``find_weights``.
        library: whose class it is.
        dtype: of the weights; the library may choose another one (``Library.dtype``). What is
            computed from the configuration stays in float32.
        keep: modules whose weights stay in float32, see ``materialise.is_kept``.

    Raises:
        ModelError: no weights, two sets of them, pickled weights without ``allow_pickle``, or
            weights that are truncated, incomplete, of another shape or type, or not finite.
    """
    if not directory.is_dir():
        raise ModelError(f"expected the folder {directory.name} in {directory.parent}, found none.")
    if not (directory / "config.json").exists():
        check_not_alone(directory)
    config = read_config(directory / "config.json")
    try:
        library.check_config(model_class, config)
    except ModelError as error:
        raise ModelError(
            f"{directory} cannot be loaded as {model_class.__name__}: {error}"
        ) from error
    return load_weights(
        model_class,
        config.content,
        lambda: with_adapter(_tensors(directory, allow_pickle, variant, library), directory),
        directory,
        library=library,
        dtype=dtype,
        keep=keep,
    )


def load_weights(
    model_class: type,
    config: Mapping[str, Any],
    open_tensors: Callable[[], Tensors],
    directory: Path,
    *,
    stated: str = "its config.json",
    library: Library = DIFFUSERS,
    dtype: torch.dtype = torch.float32,
    keep: Collection[str] = (),
) -> torch.nn.Module:
    """``load_component`` where configuration and weights are not in a folder's usual files.

    Args:
        open_tensors: opens the files; what it raises becomes a sentence on the folder.
        directory: what sentences name.
        stated: what they say that the weights must fit.

    Raises:
        ModelError: as ``load_component``.
    """
    try:
        tensors = open_tensors()
        dtype = library.dtype(tensors.entries, dtype)
        model = _filled(model_class, config, tensors, directory, stated, library, dtype, keep)
    except ModelError:
        raise
    # safetensors, pickle, zip, torch and every constructor raise their own kinds.
    except Exception as error:
        cause = first_line(root_cause(error))
        raise ModelError(
            f"{directory} cannot be loaded as {model_class.__name__}: {cause}"
        ) from error
    for name, value in model.state_dict().items():
        if not all(piece.isfinite().all() for piece in value.reshape(-1).split(AT_ONCE)):
            half = value.dtype != torch.float32
            raise ModelError(
                f"the weights in {directory} are not finite"
                f"{f' in {value.dtype}' if half else ''}: {name} holds NaN or inf"
                f"{f', or numbers beyond {torch.finfo(value.dtype).max:.6g}' if half else ''}."
            )
    tell_of_adapter(tensors, directory)
    return model.eval().requires_grad_(False)


def _tensors(directory: Path, allow_pickle: bool, variant: str | None, library: Library) -> Tensors:
    """What the one set of weights in a folder holds; safetensors before pickles."""
    try:
        names = [path.name for path in directory.iterdir() if not path.is_dir()]
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error.strerror}.") from error
    safe, pickled = library.safe_stem, library.pickle_stem
    if weights := find_weights(names, safe, "safetensors", variant, directory):
        return SafeTensors(directory, weights)
    weights = find_weights(names, pickled, "bin", variant, directory)
    if weights is None:
        check_not_alone(directory)
        raise ModelError(
            f"expected weights {safe}.safetensors in {directory}, found none (pickled ones are "
            f"fetched and read only if asked for: allow_pickle=True, --allow-pickle)."
        )
    if not allow_pickle:
        raise ModelError(
            f"{directory} holds pickled weights only ({weights.files[0]}), which are refused "
            f"unless asked for (allow_pickle=True, --allow-pickle)."
        )
    return PickledTensors(directory, weights)


def _filled(
    model_class: type,
    config: Mapping[str, Any],
    tensors: Tensors,
    directory: Path,
    stated: str,
    library: Library,
    dtype: torch.dtype,
    keep: Collection[str],
) -> torch.nn.Module:
    """The class with its weights, in which every value has been set."""
    n = len(tensors.entries)
    blueprint = build_within(lambda: library.build(model_class, config), n)
    if blueprint is None:
        raise ModelError(
            f"the weights in {directory} do not fit {stated}: it makes far more than the "
            f"{n} weights that are there."
        )
    found = library.named(blueprint, tensors.entries)
    check_fits(blueprint, found, lambda name: library.ignored(blueprint, name), directory, stated)
    keep = (*keep, *library.kept(blueprint, dtype))
    model = library.materialise(model_class, config, dtype, keep)
    # By what the file calls it: a key and its file belong to one weight.
    targets, names = model.state_dict(), {(e.file, e.key): name for name, e in found.items()}
    with torch.no_grad():
        for entry in tensors.entries.values():
            target = targets.get(names[entry.file, entry.key])
            if target is not None:
                tensors.fill(entry, target)
    return model


def read_class_names(index: dict[str, Any], n: int, *, distinct: bool = True) -> tuple[str, ...]:
    """``id2label`` of ``model_index.json`` as n names; "class 0", ... where there is none.

    diffusers itself drops ``id2label`` in ``save_pretrained``.

    Args:
        distinct: names that occur more than once get their row in brackets, with a warning.

    Raises:
        ModelError: the ids are not exactly 0 ... n - 1, or a name is empty or no text.
    """
    labels = index.get("id2label")
    if not labels:
        return tuple(f"class {i}" for i in range(n))
    try:
        by_id = {int(key): value for key, value in labels.items()}
    except (AttributeError, ValueError) as error:
        raise ModelError("id2label must map class ids to names.") from error
    if sorted(by_id) != list(range(n)) or len(labels) != n:
        raise ModelError(f"id2label must name the classes 0 to {n - 1}, got {len(labels)} ids.")
    names = [str(by_id[i]) if is_whole(by_id[i]) else by_id[i] for i in range(n)]
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ModelError(
                f"id2label must name the class {i} by a text that is not empty, got {name!r}."
            )
    return told_apart(names, "id2label") if distinct else tuple(names)


def fingerprint(module: torch.nn.Module) -> str:
    """A short digest of all weights: names and two sums of each, quick on large models too."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        total = ordered = start = 0
        # Pieces: whole weights in double precision would need more memory than they do.
        for piece in weight.detach().flatten().split(SUMMED):
            piece = piece.double()
            # The second sum also tells apart weights in another order.
            ramp = torch.arange(start, start + len(piece), dtype=piece.dtype, device=piece.device)
            total += piece.sum().item()
            ordered += (piece * ramp).sum().item()
            start += len(piece)
        digest.update(f"{name} {total:.6e} {ordered:.6e}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """diffusers logs what we are about to say in one sentence, and has a bar for shards."""
    from diffusers.utils import logging as own

    logger = logging.getLogger("diffusers")
    level, bars = logger.level, own.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    own.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            own.enable_progress_bar()
