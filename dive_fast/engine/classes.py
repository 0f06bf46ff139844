"""The conditions of the vocabulary's classes, where the network is."""

from __future__ import annotations

from functools import cached_property

import torch

from dive_fast.core.vocabulary import Vocabulary
from dive_fast.engine.cache import is_out_of_memory

# What a device may hold of it. Rows of a larger table travel from the CPU, batch by batch.
TABLE_BYTES = 1 << 30


class ClassTable:
    """One row per condition: row c * parts + i is part i of class c.

    The table is copied to the device once, when the first row is asked for. A table of more than
    ``TABLE_BYTES``, or one that the device has no memory for, stays on the CPU.

    Args:
        vocabulary: of the model.
        device: where the network is.
    """

    def __init__(self, vocabulary: Vocabulary, device: torch.device) -> None:
        self.rows = vocabulary.table.view(len(vocabulary) * vocabulary.parts, -1)
        self.device = device

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Rows int64 [N] as float32 [N, D] on the device."""
        return self._placed[index.to(self._placed.device)].to(self.device).float()

    def release(self) -> bool:
        """Leaves the device for good; False if it was not there."""
        held = "_placed" in vars(self) and self._placed is not self.rows
        self._placed = self.rows
        return held

    @cached_property
    def _placed(self) -> torch.Tensor:
        if self.rows.nbytes > TABLE_BYTES:
            return self.rows
        try:
            return self.rows.to(self.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return self.rows
