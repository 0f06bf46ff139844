"""What is fitted to a model and kept beside it, in ``dive_fast.json``."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dive_fast.core.shortlist import Shortlist
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models.files.checkpoint import read_json
from dive_fast.models.protocol import Model, optional

FILE = "dive_fast.json"


@dataclass(frozen=True)
class Fitted:
    """What ``dive_fast.json`` says of fitted values; None where it does not.

    Attributes:
        beta: inverse temperature of log p(y | x0) = -beta L + log p(y).
        timesteps: learned density and weights of the probes' timesteps.
        shortlist: learned correction of the estimates that ``auto`` ranks classes by.
    """

    beta: float | None = None
    timesteps: TimestepWeights | None = None
    shortlist: Shortlist | None = None


def apply_fitted(model: Model, fitted: Fitted) -> None:
    """Sets on a model what was fitted to it; a shortlist of other classes is left out."""
    if fitted.beta is not None:
        model.beta = fitted.beta
    model.timesteps = fitted.timesteps
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
    if not required and not path.exists():
        return Fitted()
    content = read_json(path)
    beta = content.get("beta")
    good = isinstance(beta, int | float) and not isinstance(beta, bool) and 0 < beta < math.inf
    if beta is not None and not good:
        raise ModelError(f"beta in {path} must be above 0, got {beta!r}.")
    learned = {}
    for key, kind in (("timesteps", TimestepWeights), ("shortlist", Shortlist)):
        try:
            learned[key] = kind.from_dict(content[key]) if content.get(key) is not None else None
        except DiveFastError as error:
            raise ModelError(f"{key} in {path} cannot be used: {error}") from error
    return Fitted(None if beta is None else float(beta), **learned)


def write_fitted(directory: Path, fitted: Fitted) -> Path:
    """Puts the values into ``dive_fast.json`` and keeps its other entries; None takes one out.

    The directory is made if it is missing; the file is there whole or as it was.

    Returns:
        The file's path.

    Raises:
        ModelError: the file there is damaged, or cannot be written.
    """
    path = directory / FILE
    content = read_json(path) if path.exists() else {}
    values = {
        "beta": fitted.beta,
        "timesteps": None if fitted.timesteps is None else fitted.timesteps.to_dict(),
        "shortlist": None if fitted.shortlist is None else fitted.shortlist.to_dict(),
    }
    content = {key: value for key, value in (content | values).items() if value is not None}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def _replace(path: Path, text: str) -> None:
    """Two writers at once each leave a whole file: the names of their temporary ones differ."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a model directory may be shared.
        mode = path.stat().st_mode if path.exists() else 0o666 & ~_umask()
        os.chmod(temporary, mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
