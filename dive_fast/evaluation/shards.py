"""A run in parts on many machines: which images a shard has, and where its run lies."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dive_fast.errors import RunError, shown

# What tells a process its place: (rank from 0, how many). A step of srun has a number of its own;
# the variables of a job alone are also in shells and scripts that are no part of one.
_LAUNCHERS = (
    ("torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("srun", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
Data = TypeVar("Data")
_FOLDER = re.compile(r"shard-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Shard:
    """One of the parts that a data set is divided into: every ``of``-th image.

    Attributes:
        index: 1 to ``of``.
        of: how many parts there are.
        local_rank: of its process on its machine, from 0, where a launcher told it.
    """

    index: int
    of: int
    local_rank: int | None = None

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.index, self.of))
        if not whole or not 1 <= self.index <= self.of:
            raise RunError(
                "expected a shard I/N with I from 1 to N, such as 3/16, got "
                f"{shown(self.index)}/{shown(self.of)}."
            )

    @classmethod
    def read(cls, text: str, environment: Mapping[str, str] | None = None) -> Shard:
        """The shard that a text such as "3/16" names, or of "auto" the one of this process.

        Args:
            environment: variables of the process, in which torchrun and srun tell its place.

        Raises:
            RunError: it is no such text, out of range, or nothing tells the process its place.
        """
        if text == "auto":
            found = launched(os.environ if environment is None else environment)
            if found is None:
                raise RunError(
                    "--shard auto takes rank and number from torchrun or srun, and found neither: "
                    "give I/N, such as 3/16."
                )
            return found
        match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text) if _is_text(text) else None
        if match is None:
            raise RunError(f"expected a shard I/N such as 3/16, or auto, got {shown(text)}.")
        return cls(int(match[1]), int(match[2]))

    def positions(self, n: int) -> range:
        """Which of ``n`` images it has: neighbours, often of one class, go to different shards.

        Raises:
            RunError: none, for there are fewer images than shards.
        """
        if self.index > n:
            raise RunError(f"the shard {self} has no image: there are {n} in all.")
        return range(self.index - 1, n, self.of)

    def folder(self, out: str | os.PathLike[str]) -> Path:
        """Where its run lies: a folder of its own in ``out``."""
        width = max(2, len(str(self.of)))
        return Path(out) / f"shard-{self.index:0{width}}-of-{self.of:0{width}}"

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def launched(environment: Mapping[str, str]) -> Shard | None:
    """The place of this process among those of torchrun or srun; None where it was not so begun.

    Raises:
        RunError: the variables contradict each other.
    """
    for launcher, mark, *names in _LAUNCHERS:
        if mark not in environment:
            continue
        try:
            rank, size, local = (int(environment[name]) for name in names)
        except (KeyError, ValueError) as error:
            raise RunError(
                f"expected {', '.join(names)} of {launcher} as numbers in the environment, got "
                f"{', '.join(str(environment.get(name)) for name in names)}."
            ) from error
        return Shard(rank + 1, size, local)
    return None


def shard_folders(path: Path) -> list[Path]:
    """The folders of shards in ``path``, by their names."""
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir())


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def as_shard(
    out: str | os.PathLike[str], data: Data, ids: Sequence[str], shard: Shard | str | None
) -> tuple[Path, Data, dict[str, Any], dict[str, Any]]:
    """A run's directory, data, configuration and facts where it is of a shard.

    Args:
        out: of the whole run.
        data: the whole set; ``take(positions)`` gives a part of it.
        ids: of its images.
        shard: a ``Shard`` or its text; None for the whole.

    Returns:
        The directory, the shard's data, what is added to the run's ``config`` and to its facts.

    Raises:
        RunError: as ``Shard``.
    """
    if shard is None:
        return Path(out), data, {}, {}
    if not isinstance(shard, Shard):
        shard = Shard.read(shard)
    own = shard.positions(len(ids))
    images = {"images": [ids[i] for i in own]}
    return shard.folder(out), data.take(own), {"shard": str(shard)}, images
