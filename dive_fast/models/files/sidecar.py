"""What is kept beside a model in ``dive_fast.json``: what diffusers' files have no place for."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.core.config import LARGEST_FLOAT
from dive_fast.core.detection import DetectionRule
from dive_fast.core.files import replacing
from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.numbers import is_number
from dive_fast.core.segmentation import SegmentationRule
from dive_fast.core.shortlist import OLD_FIELDS, Shortlist
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.files.reading import read_json
from dive_fast.models.protocol import Model, optional

FILE = "dive_fast.json"
_KINDS = {
    "timesteps": TimestepWeights,
    "shortlist": Shortlist,
    "loss_weights": LossWeights,
    "segmentation": SegmentationRule,
    "detection": DetectionRule,
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """What ``dive_fast.json`` says of fitted values; None where it does not.

    Attributes:
        inverse_temperature: beta of log p(y | x0) = -beta L + log p(y).
        timesteps: learned density and weights of the probes' timesteps.
        shortlist: learned correction of the estimates that ``auto`` ranks classes by.
        loss_weights: what losses count at each timestep, with a beta of their own.
        segmentation: how error maps count at a place.
        detection: when an object counts as found.
    """

    inverse_temperature: float | None = None
    timesteps: TimestepWeights | None = None
    shortlist: Shortlist | None = None
    loss_weights: LossWeights | None = None
    segmentation: SegmentationRule | None = None
    detection: DetectionRule | None = None


def read_extra(directory: Path) -> dict[str, Any]:
    """The content of ``dive_fast.json`` beside ``model_index.json``; empty where there is none.

    Raises:
        ModelError: it is there, but cannot be read.
    """
    path = directory / FILE
    return read_json(path) if path.exists() else {}


def write_extra(directory: Path, content: dict[str, Any]) -> Path:
    """Writes ``dive_fast.json``, whole or not at all; the directory is made if it is missing.

    Returns:
        The file's path.

    Raises:
        ModelError: it cannot be written.
    """
    path = directory / FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def apply_fitted(model: Model, fitted: Fitted) -> None:
    """Sets on a model what was fitted to it; a shortlist of other classes is left out."""
    if fitted.inverse_temperature is not None:
        model.inverse_temperature = fitted.inverse_temperature
    model.timesteps = fitted.timesteps
    model.loss_weights = fitted.loss_weights
    model.segmentation = fitted.segmentation
    model.detection = fitted.detection
    if fitted.shortlist is not None and fitted.shortlist.fits(model.vocabulary):
        model.shortlist = fitted.shortlist


def fitted_shortlist(model: Model) -> Shortlist | None:
    """The model's shortlist, if it was learned for the classes that the model has now."""
    shortlist = optional(model, "shortlist")
    return shortlist if shortlist is not None and shortlist.fits(model.vocabulary) else None


def read_fitted(directory: Path, *, required: bool = False) -> Fitted:
    """The fitted values of a model directory.

    Args:
        required: the file must be there; without it nothing was fitted.

    Raises:
        ModelError: the file is missing though required, unreadable, or holds values that are none.
    """
    path = directory / FILE
    content = read_json(path) if required else read_extra(directory)
    beta = content.get("beta")
    if beta is not None and not (is_number(beta) and 0 < beta <= LARGEST_FLOAT):
        raise ModelError(f"beta in {path} must be above 0 and below 3e38, got {shown(beta)}.")
    if isinstance(content.get("shortlist"), dict) and set(content["shortlist"]) == OLD_FIELDS:
        log.warning("the shortlist in %s is of an earlier version: fit it again.", path)
        content = content | {"shortlist": None}
    learned = {}
    for key, kind in _KINDS.items():
        try:
            learned[key] = kind.from_dict(content[key]) if content.get(key) is not None else None
        except DiveFastError as error:
            raise ModelError(f"{key} in {path} cannot be used: {error}") from error
    return Fitted(None if beta is None else float(beta), **learned)


def write_fitted(directory: Path, fitted: Fitted) -> Path:
    """Puts the values into ``dive_fast.json`` and keeps its other entries; None takes one out.

    Returns:
        The file's path.

    Raises:
        ModelError: the file there is damaged, or as ``write_extra``.
    """
    content = read_extra(directory) | fitted_entries(fitted)
    content = {key: value for key, value in content.items() if value is not None}
    return write_extra(directory, content)


def fitted_entries(fitted: Fitted) -> dict[str, Any]:
    """The values for JSON, None where there are none."""
    found: dict[str, Any] = {"beta": fitted.inverse_temperature}
    for key in _KINDS:
        value = getattr(fitted, key)
        found[key] = None if value is None else value.to_dict()
    return found
