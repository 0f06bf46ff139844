"""The runs of shards made one run, if they belong together and nothing is missing or doubled."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.core.numbers import is_whole
from dive_fast.errors import RunError, shown, some
from dive_fast.evaluation.recordindex import RecordIndex
from dive_fast.evaluation.records import Form
from dive_fast.evaluation.rundir import VERSIONS, RunDirectory, first_difference
from dive_fast.evaluation.runfiles import RESULTS, cannot, each_result, read_run
from dive_fast.evaluation.shards import Shard, shard_folders

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """One shard's run as it lies there."""

    path: Path
    shard: Shard
    content: dict[str, Any]
    images: tuple[str, ...]  # that it should hold
    records: RecordIndex

    @property
    def config(self) -> dict[str, Any]:
        """Without what tells shards apart."""
        return {k: v for k, v in self.content["config"].items() if k != "shard"}


def merge(
    runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> Path:
    """Makes one run of the runs of all shards: as if one process had run them all.

    The merged run has the configuration of one without shards, so that ``evaluate`` without
    ``shard`` goes on with it, and finds nothing left to do.

    Args:
        runs: run directories of shards, or directories that hold such.
        out: of the merged run; the directory that holds the shards if None. A merged run that is
            there already is completed.

    Returns:
        The merged run's directory.

    Raises:
        RunError: they are of different configurations, no shards, a shard or an image is missing
            or doubled, a file is damaged, or ``out`` cannot be written. Versions that differ are
            warned of.
    """
    folders, parent = _folders(runs)
    parts = [_read(folder) for folder in folders]
    if out is None and parent is None:
        raise RunError("expected --out DIR, the directory of the merged run, got none.")
    _expect_one_configuration(parts)
    _expect_all_shards(parts)
    _expect_all_images(parts)
    _tell_versions(parts)
    target = Path(parent if out is None else out)
    _write(parts, target)
    return target


def _folders(runs: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], Path | None]:
    """The runs' folders, and the one folder that holds them all, if one was named."""
    found: list[Path] = []
    for run in map(Path, runs):
        inside = shard_folders(run)
        if not inside and not run.is_dir():
            raise RunError(f"{run}: expected the run of a shard or a folder of such, got none.")
        found += inside or [run]
    unique = list(dict.fromkeys(path.resolve() for path in found))
    if len(unique) < len(found):
        raise RunError("expected each run once, got one of them twice.")
    if not found:
        raise RunError("expected the runs of shards, got none.")
    alone = Path(runs[0]) if len(runs) == 1 and shard_folders(Path(runs[0])) else None
    return found, alone


def _read(path: Path) -> _Part:
    content = read_run(path)
    told, images = content["config"].get("shard"), content.get("images")
    if not isinstance(told, str) or not _are_texts(images):
        raise RunError(f"{path}: expected the run of a shard (evaluate --shard), got a whole run.")
    records = RecordIndex(path / RESULTS)
    try:
        for start, _, record in each_result(path / RESULTS, Form(content.get("records"))):
            records.add(record, start)
    except OSError as error:
        raise cannot("read", path / RESULTS, error) from error
    return _Part(path, Shard.read(told), content, tuple(images), records)


def _expect_one_configuration(parts: Sequence[_Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        difference = first_difference(first.config, part.config)
        if difference is None and first.content.get("records") != part.content.get("records"):
            difference = "one is of a classifier and one of a detector"
        if difference is None and first.shard.of != part.shard.of:
            difference = f"it is of {first.shard.of} shards there and of {part.shard.of} here"
        if difference is not None:
            raise RunError(f"{part.path} does not belong to {first.path}: {difference}.")


def _expect_all_shards(parts: Sequence[_Part]) -> None:
    by_index: dict[int, _Part] = {}
    for part in parts:
        if (other := by_index.setdefault(part.shard.index, part)) is not part:
            doubled = [key for key in part.images if key in other.records] or list(part.images)
            raise RunError(
                f"{other.path} and {part.path} are both the shard {part.shard}: the images "
                f"{some(doubled)} would be doubled."
            )
    of = parts[0].shard.of
    if missing := [str(i) for i in range(1, of + 1) if i not in by_index]:
        raise RunError(
            f"expected the shards 1 to {of}, and {', '.join(missing[:8])}"
            f"{' ...' if len(missing) > 8 else ''} of {of} {'is' if len(missing) == 1 else 'are'} "
            "missing."
        )


def _expect_all_images(parts: Sequence[_Part]) -> None:
    of_image: dict[str, _Part] = {}
    for part in parts:
        for key in part.images:
            if (other := of_image.setdefault(key, part)) is not part:
                raise RunError(f"the image {key!r} is doubled: in {other.path} and {part.path}.")
        if lacking := [key for key in part.images if key not in part.records]:
            raise RunError(
                f"{part.path} is not finished: {len(lacking)} of {len(part.images)} images are "
                f"missing, {some(lacking)}; run its evaluate again."
            )
        if foreign := [key for key in part.records if of_image.get(key) is not part]:
            raise RunError(f"{part.path}: the images {some(foreign)} are not of the shard.")
    data = parts[0].config.get("data")
    count = data.get("count") if isinstance(data, dict) else None
    if is_whole(count) and count != len(of_image):
        raise RunError(f"expected {count} images of all shards together, got {len(of_image)}.")


def _tell_versions(parts: Sequence[_Part]) -> None:
    for name in VERSIONS:
        found: dict[str, Path] = {}
        for part in parts:
            for past in _environments(part):
                if isinstance(past.get(name), str):
                    found.setdefault(past[name], part.path)
        if len(found) > 1:
            (one, here), (two, there), *_ = found.items()
            log.warning(
                "%s was computed with %s %s and %s with %s %s: answers may differ.",
                here, name, shown(one)[1:-1], there, name, shown(two)[1:-1],
            )  # fmt: skip
            return


def _environments(part: _Part) -> list[dict[str, Any]]:
    resumed = part.content.get("resumed")
    past = [part.content.get("environment"), *(resumed if isinstance(resumed, list) else ())]
    return [one for one in past if isinstance(one, dict)]


def _write(parts: Sequence[_Part], target: Path) -> None:
    first = parts[0].content
    kind, environment = first.get("records"), first.get("environment") or {}
    known = ("config", "environment", "resumed", "records", "images")
    facts = {k: v for k, v in first.items() if k not in known}
    facts["shards"] = [
        {"shard": str(part.shard), "environments": _environments(part)} for part in parts
    ]
    form = Form(kind) if kind is not None else None
    with RunDirectory.open(
        target, parts[0].config, environment, form, facts=facts, beside_shards=True
    ) as run:
        for part in sorted(parts, key=lambda part: part.shard.index):
            for key in part.images:
                if not run.finished(key):
                    run.append(part.records[key])


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
