"""A linear head on the network's features: what one forward says of every class.

    z = (f - mean) / scale,    out = z W^T + b

f are the activations of one block at one timestep, their means over the cells of a grid laid on the
image, one cell after the other. ``kind`` says what was learned. "linear": out are the logits of the
labels. "losses": out are enumeration's losses, less their mean over the classes. "attention": as
"linear", but the tokens z_n are pooled by a learned query q,

    z = sum over n of softmax_n(q . z_n / sqrt(D)) z_n
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dive_fast.core.files import replacing
from dive_fast.core.numbers import is_number, whole
from dive_fast.core.shortlist import digest
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import DiveFastError, ModelError, shown

KINDS = ("linear", "losses", "attention")
MOST_RANKS = 64  # of ``recall``
MOST_CELLS = 64  # along a side
_FORMAT = "dive_fast.head"
_TENSORS = ("weight", "bias", "mean", "scale", "query")
_WORDS = ("layer", "timestep", "grid", "kind", "classes", "recall")


@dataclass(frozen=True, eq=False)
class Head:
    """A head for one model and one vocabulary.

    Attributes:
        layer: the block whose features it reads, a name of ``DiffusionClassifier.layers``.
        timestep: of x_t.
        grid: cells along a side, 1 for the mean over all positions; None of kind "attention".
        kind: "linear", "losses" or "attention".
        weight: float32 [C, D]; D counts the values of all cells.
        bias: float32 [C].
        mean, scale: float32 [D], of the features that it was trained on; scale above 0.
        classes: digest of the names that it was learned for (``core.shortlist.digest``).
        recall: share of held-out images whose generative answer (that of ``auto``; of kind "losses"
            the lowest of the measured losses) is among the head's first n, n = 1, 2, ..., at most
            ``MOST_RANKS``; empty where it was not measured.
        query: float32 [D] of kind "attention", else None.

    Raises:
        DiveFastError: something is none of its kind, or does not fit the rest.
    """

    layer: str
    timestep: int
    grid: int | None
    kind: str
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    classes: str
    recall: tuple[float, ...] = ()
    query: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DiveFastError(
                f"a head's kind must be one of {', '.join(KINDS)}, got {shown(self.kind)}."
            )
        for name in ("layer", "classes"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise DiveFastError(
                    f"a head's {name} must be a text, got {shown(getattr(self, name))}."
                )
        if self.kind != "attention":
            grid = whole("a head's grid", self.grid, 1, MOST_CELLS)
            object.__setattr__(self, "grid", grid)
        elif self.grid is not None:
            raise DiveFastError(f"a head of kind attention has no grid, got {shown(self.grid)}.")
        object.__setattr__(self, "timestep", whole("a head's timestep", self.timestep, 0))
        self._check_tensors()
        recall = self.recall
        good = isinstance(recall, list | tuple) and len(recall) <= MOST_RANKS
        good = good and all(is_number(x, 0) and x <= 1 for x in recall)
        if not good or list(recall) != sorted(recall):
            raise DiveFastError(
                f"a head's recall must hold at most {MOST_RANKS} shares from 0 to 1 that do not "
                f"fall, got {shown(recall)}."
            )
        object.__setattr__(self, "recall", tuple(map(float, recall)))

    def _check_tensors(self) -> None:
        weight = self.weight
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.numel() == 0:
            got = list(weight.shape) if isinstance(weight, torch.Tensor) else shown(weight)
            raise DiveFastError(f"a head's weight must be a tensor [C, D], got {got}.")
        c, d = weight.shape
        shapes = {"weight": [c, d], "bias": [c], "mean": [d], "scale": [d]}
        if self.kind == "attention":
            shapes["query"] = [d]
        elif self.query is not None:
            raise DiveFastError(f"a head of kind {self.kind} has no query, got one.")
        for name, shape in shapes.items():
            given = getattr(self, name)
            if not isinstance(given, torch.Tensor) or list(given.shape) != shape:
                got = list(given.shape) if isinstance(given, torch.Tensor) else shown(given)
                raise DiveFastError(f"a head's {name} must be a tensor {shape}, got {got}.")
            given = given.detach().to("cpu", torch.float32).contiguous()
            if not bool(given.isfinite().all()):
                raise DiveFastError(f"a head's {name} must be finite, got NaN or infinity.")
            object.__setattr__(self, name, given)
        if not bool((self.scale > 0).all()):
            raise DiveFastError(
                f"a head's scale must be above 0, got {self.scale.min().item():.4g}."
            )

    @property
    def dim(self) -> int:
        return self.weight.shape[1]

    def fits(self, vocabulary: Vocabulary) -> bool:
        """Whether it was learned for these classes."""
        names = vocabulary.names
        return len(self.weight) == len(names) and self.classes == digest(names)

    @property
    def pool(self) -> str | None:
        """How the request ``Features`` shall pool for it."""
        return "mean" if self.grid == 1 else None

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """How well each class suits, higher is better.

        Args:
            features: float [..., D]; of kind "attention" [..., tokens, D].

        Returns:
            float32 [..., C]: log p(y | f), or the negated losses that are expected, of mean 0.

        Raises:
            DiveFastError: features of another width.
        """
        least = 2 if self.kind == "attention" else 1
        if features.ndim < least or features.shape[-1] != self.dim:
            expected = "[..., tokens, D]" if self.kind == "attention" else "[..., D]"
            raise DiveFastError(
                f"expected features {expected} with D = {self.dim}, got {list(features.shape)}."
            )
        z = (features.to("cpu", torch.float32) - self.mean) / self.scale
        if self.kind == "attention":
            z = attend(z, self.query)
        out = z @ self.weight.T + self.bias
        return -out if self.kind == "losses" else out.log_softmax(dim=-1)

    def read(self, found: torch.Tensor) -> torch.Tensor:
        """``scores`` of activations as ``Features`` gives them with ``pool``: float32 [B, C]."""
        return self.scores(in_cells(found, self.grid))

    def digest(self) -> str:
        """Tells one head from another, as 16 hexadecimal digits: for the identity of a run."""
        found = hashlib.sha256(json.dumps(self._words()).encode())
        for tensor in self._tensors().values():
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            ModelError: it cannot be written.
        """
        path = _path(path)
        words = {"format": _FORMAT, "head": json.dumps(self._words())}
        try:
            with replacing(path) as file:
                file.write(save(self._tensors(), metadata=words))
        except OSError as error:
            raise ModelError(f"{path}: cannot be written ({error.strerror or error}).") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Head:
        """What ``save`` wrote.

        Raises:
            ModelError: there is no such file, or it is damaged or something else.
        """
        path = _path(path)
        if not path.is_file():
            raise ModelError(f"{path}: expected a file of a head, but there is none.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{path}: expected a head as a safetensors file, got a damaged file or something "
                "else."
            ) from error
        try:
            if metadata.get("format") != _FORMAT:
                raise DiveFastError("expected a head that 'dive-fast probe' wrote")
            words = json.loads(metadata.get("head", ""))
            if not isinstance(words, Mapping) or set(words) != set(_WORDS):
                raise DiveFastError(f"a head must say exactly {', '.join(_WORDS)}")
            if not set(tensors) <= set(_TENSORS):
                raise DiveFastError(f"a head has no tensors but {', '.join(_TENSORS)}")
            missing = dict.fromkeys(_TENSORS[:-1])
            return cls(**words, **{**missing, **tensors})
        except (DiveFastError, ValueError, RecursionError) as error:
            reason = str(error).rstrip(".") if isinstance(error, DiveFastError) else "damaged"
            raise ModelError(f"{path}: not a head ({reason}).") from error

    def _words(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _WORDS}

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def in_cells(found: torch.Tensor, grid: int | None) -> torch.Tensor:
    """Activations of B images as a head takes them.

    Args:
        found: [B, D], pooled, for a grid of 1; else [B, D, h, w] or [B, N, D], tokens row by row.
        grid: cells along a side; None leaves tokens.

    Returns:
        [B, grid grid D], means over the cells, one after the other, row by row; or [B, N, D].

    Raises:
        DiveFastError: activations of another shape, or tokens that are no square.
    """
    if grid == 1 and found.ndim == 2:
        return found
    if found.ndim not in (3, 4):
        raise DiveFastError(
            f"expected activations [B, D, h, w] or [B, tokens, D], got {list(found.shape)}."
        )
    if grid is None:
        return found.flatten(2).mT.contiguous() if found.ndim == 4 else found
    if found.ndim == 3:
        side = math.isqrt(found.shape[1])
        if side * side != found.shape[1]:
            raise DiveFastError(f"expected tokens of a square image, got {found.shape[1]}.")
        found = found.mT.unflatten(2, (side, side))
    cells = torch.nn.functional.adaptive_avg_pool2d(found.float(), grid)
    return cells.flatten(2).mT.flatten(1).contiguous()


def attend(z: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Tokens [..., N, D] pooled by a query [D] into [..., D]."""
    weights = (z @ query / math.sqrt(len(query))).softmax(dim=-1)
    return (weights[..., None] * z).sum(dim=-2)


def recall_at(scores: torch.Tensor, answers: torch.Tensor) -> tuple[float, ...]:
    """Share of the images whose answer is among the first n classes, n = 1 to ``MOST_RANKS``.

    Args:
        scores: float [B, C], higher is better; of equal ones the lower index comes first.
        answers: int64 [B].
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = (order == answers[:, None]).double().argmax(dim=-1)
    n = min(scores.shape[-1], MOST_RANKS)
    return tuple((rank < k).double().mean().item() for k in range(1, n + 1))


def _path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ModelError(f"expected the path of a head, got {shown(path)}.")
    return Path(path)
