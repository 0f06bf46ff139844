"""Reading diffusers model directories: every way that one can be broken is one clear sentence."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dive_fast.core.distinct import told_apart
from dive_fast.core.numbers import is_whole
from dive_fast.errors import ModelError

WEIGHTS = "diffusion_pytorch_model"

# Reads a component: (class, directory, safetensors or pickles) to the model in float32 and what
# did not fit, as {"missing_keys": names, "unexpected_keys": names}.
Reader = Callable[[type, Path, bool], tuple[torch.nn.Module, dict[str, Any]]]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ModelError: missing, unreadable, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"expected {path.name} in {path.parent}, found none.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def read_diffusers(
    model_class: type, directory: Path, safe: bool
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A diffusers ``ModelMixin``; see ``Reader``."""
    with _quiet_diffusers():
        return model_class.from_pretrained(
            directory,
            use_safetensors=safe,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            local_files_only=True,
        )


def load_component(
    model_class: type,
    directory: Path,
    allow_pickle: bool,
    *,
    read: Reader = read_diffusers,
    safe_name: str = WEIGHTS,
    pickle_name: str = WEIGHTS,
) -> torch.nn.Module:
    """One component of a pipeline, complete, finite and frozen, in float32.

    Args:
        model_class: its class.
        directory: the component's folder, with ``config.json`` and the weights.
        allow_pickle: also take ``.bin`` weights (read with ``weights_only=True``).
        read: how the class is read.
        safe_name, pickle_name: the weights' file, without ``.safetensors`` and ``.bin``; other
            variants beside it (``.fp16.safetensors``) are not looked at.

    Raises:
        ModelError: no weights, pickled weights without ``allow_pickle``, or weights that are
            truncated, incomplete, of another shape, or not finite.
    """
    if not directory.is_dir():
        raise ModelError(f"expected the folder {directory.name} in {directory.parent}, found none.")
    read_json(directory / "config.json")
    paths = _weights(directory, safe_name, "safetensors")
    safe = bool(paths)
    if not safe:
        paths = _weights(directory, pickle_name, "bin")
        if not paths:
            raise ModelError(
                f"expected weights {safe_name}.safetensors in {directory}, found none (pickled "
                f"ones are fetched and read only if asked for: allow_pickle=True, --allow-pickle)."
            )
        if not allow_pickle:
            raise ModelError(
                f"{directory} holds pickled weights only ({pickle_name}.bin), which are refused "
                f"unless asked for (allow_pickle=True, --allow-pickle)."
            )
    _check_files(paths)
    try:
        model, report = read(model_class, directory, safe)
    except Exception as error:  # safetensors, pickle, zip and torch each raise their own kinds
        raise ModelError(
            f"{directory} cannot be loaded as {model_class.__name__}: {first_line(_root(error))}"
        ) from error
    for key in ("missing_keys", "unexpected_keys"):
        if report[key]:
            names = sorted(report[key])
            raise ModelError(
                f"the weights in {directory} do not fit its config.json: {len(names)} "
                f"{key.replace('_', ' ')}, the first is {names[0]}."
            )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"the weights in {directory} are not finite: {name} holds NaN or inf.")
    return model.eval().requires_grad_(False)


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
        weight = weight.detach().double().flatten()
        # The second sum also tells apart weights in another order.
        ramp = torch.arange(len(weight), dtype=torch.float64, device=weight.device)
        digest.update(
            f"{name} {weight.sum().item():.6e} {(weight * ramp).sum().item():.6e}".encode()
        )
    return digest.hexdigest()[:16]


def _weights(directory: Path, name: str, suffix: str) -> list[Path]:
    """The weights' file, or its shards."""
    pattern = re.compile(rf"{re.escape(name)}(-\d{{5}}-of-\d{{5}})?\.{suffix}")
    return sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name))


def _check_files(paths: list[Path]) -> None:
    """That none is empty, and that safetensors are whole, which their header tells."""
    for path in paths:
        try:
            if path.stat().st_size == 0:
                raise ModelError(f"expected weights in {path}, got an empty file (0 bytes).")
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is truncated or damaged: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says something, ended by a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # "Error(s) in loading state_dict for ...:" only announces the next line.
    lines = [line for line in lines if not line.endswith(":")] or [type(error).__name__]
    return lines[0] if lines[0].endswith(".") else lines[0] + "."


def _root(error: BaseException) -> BaseException:
    """What went wrong first: diffusers says of every unreadable file that it is unreadable."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """diffusers logs what we are about to say in one sentence."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
