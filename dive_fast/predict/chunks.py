"""What is computed image by image and kept in a folder, so that a killed run computes the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dive_fast.core.files import replacing
from dive_fast.errors import RunError

CHUNK = 256  # images a file unless said: what a kill may lose


class Chunks:
    """Tensors [B, ...] by name, in memory or, with a folder, in files of some images each.

    Whoever names a folder sees to it that a name means one thing there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def get(
        self,
        name: str,
        count: int,
        compute: Callable[[int, int], torch.Tensor],
        chunk: int = CHUNK,
    ) -> torch.Tensor:
        """float32 [count, ...]: read where it is there, else computed and written.

        Args:
            name: of the tensor.
            count: B.
            compute: of images from start to stop, float32 [stop - start, ...].
            chunk: images a file.

        Raises:
            RunError: the folder cannot be written.
        """
        parts = []
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            parts.append(self._part(name, start, stop, compute))
        return torch.cat(parts)

    def _part(self, name: str, start: int, stop: int, compute: Callable) -> torch.Tensor:
        if self.folder is None:
            return compute(start, stop).float()
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9@.=-]', '_', name)}-{start:07d}.npy"
        if (found := _read(path, stop - start)) is not None:
            return found
        made = compute(start, stop).float().contiguous()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.save(file, made.numpy(), allow_pickle=False)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror or error}).") from error
        return made


def _read(path: Path, count: int) -> torch.Tensor | None:
    """float32 [count, ...], or None where there is no whole file of it."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if (
        not isinstance(found, np.ndarray)
        or found.dtype != np.float32
        or found.shape[:1] != (count,)
    ):
        return None
    return torch.from_numpy(found)
