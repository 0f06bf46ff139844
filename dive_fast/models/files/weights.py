"""Which files of a component's folder hold its weights: exactly one set of them, or a refusal.

diffusers and transformers write the weights of a component as

    NAME.safetensors                        in one file,
    NAME-00001-of-00002.safetensors         or in shards, with the index
    NAME.safetensors.index.json             that says which shard holds which weight,

each also as a variant ("fp16"): NAME.fp16.safetensors, NAME.fp16-00001-of-00002.safetensors with
NAME.safetensors.index.fp16.json, or, up to diffusers 0.32, NAME-00001-of-00002.fp16.safetensors.
Where two sets of one variant lie in a folder, nothing says which is meant: none is taken.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dive_fast.errors import ModelError, shown, some

FULL = ""  # the variant that has no name
# Of the weights' files: diffusers' and transformers'.
STEMS = {
    "safetensors": ("diffusion_pytorch_model", "model"),
    "bin": ("diffusion_pytorch_model", "pytorch_model"),
}


@dataclass
class WeightSet:
    """The files of one variant, by their names.

    Attributes:
        files: one, or the shards in order.
        index: of the shards; None of a single file.
    """

    files: list[str]
    index: str | None = None

    @property
    def all_files(self) -> list[str]:
        return self.files + ([] if self.index is None else [self.index])


@dataclass
class _Found:
    """What lies there of one variant."""

    single: str | None = None
    shards: dict[int, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    same: list[tuple[str, str]] = field(default_factory=list)  # one shard under two names
    indices: list[str] = field(default_factory=list)


def find_weights(
    names: Iterable[str], stem: str, suffix: str, variant: str | None, where: object
) -> WeightSet | None:
    """The set to read among the names of a folder's files.

    Args:
        stem, suffix: "diffusion_pytorch_model" and "safetensors", for example.
        variant: "fp16", for example; a folder that lacks it is read in full precision. None for
            full precision or, where there is none, for the only variant.
        where: what the sentences call the folder.

    Returns:
        None where the folder has no weights of this kind.

    Raises:
        ModelError: two sets of one variant, shards that are missing, or only variants of which none
            was asked for.
    """
    found = _by_variant(names, stem, suffix)
    if not found:
        return None
    if variant is not None and variant in found:
        chosen = variant
    elif FULL in found:
        chosen = FULL
    elif variant is None and len(found) == 1:
        (chosen,) = found
    else:
        wanted = "full precision" if variant is None else f"the variant {variant!r}"
        raise ModelError(
            f"expected weights of {wanted} in {where}, got the variants {some(sorted(found))} only "
            f"(variant='{min(found)}', --variant {min(found)})."
        )
    return _whole_set(found[chosen], suffix, where)


def wanted_weights(
    names: Sequence[str], variant: str | None, allow_pickle: bool, where: object
) -> list[str]:
    """The files that ``find_weights`` would read of a folder, of whichever library.

    Raises:
        ModelError: as ``find_weights``.
    """
    for suffix in ("safetensors", "bin") if allow_pickle else ("safetensors",):
        sets = [find_weights(names, stem, suffix, variant, where) for stem in STEMS[suffix]]
        if files := [file for each in sets if each is not None for file in each.all_files]:
            return files
    return []


def is_index(name: str) -> bool:
    """Whether it is the index of shards, of whatever stem and variant."""
    return re.search(r"\.index(\.[\w-]+)?\.json$", name) is not None


def check_variant_name(variant: object) -> None:
    """Raises ModelError for what cannot be part of a file's name."""
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        raise ModelError(f"expected the name of a variant such as 'fp16', got {shown(variant)}.")


def check_variant(directory: Path, folders: Sequence[str] | None, variant: str) -> None:
    """That weights of a variant lie in some folder of a model's directory.

    Args:
        folders: those that are read; None for all.

    Raises:
        ModelError: they do not.
    """
    if folders is None:
        folders = [path.name for path in directory.iterdir() if path.is_dir()]
    found = [directory / folder for folder in folders if (directory / folder).is_dir()]
    check_among(
        {v for f in found for v in variants(p.name for p in f.iterdir())}, variant, directory
    )


def check_among(known: Iterable[str], variant: str, where: object) -> None:
    """That a variant is one of those that were found.

    Raises:
        ModelError: it is not; the sentence lists them.
    """
    known = set(known)
    if variant not in known:
        listed = [some(sorted(known - {FULL}))] if known - {FULL} else []
        listed += ["full precision"] if FULL in known else []
        raise ModelError(
            f"expected weights of the variant {variant!r} in {where}, got "
            f"{' and '.join(listed) or 'no weights'} only."
        )


def variants(names: Iterable[str]) -> set[str]:
    """The variants among a folder's files, of whichever library; full precision is ""."""
    names = list(names)
    kinds = ((stem, suffix) for suffix, stems in STEMS.items() for stem in stems)
    return {variant for kind in kinds for variant in _by_variant(names, *kind)}


def _by_variant(names: Iterable[str], stem: str, suffix: str) -> dict[str, _Found]:
    stem, suffix = re.escape(stem), re.escape(suffix)
    weights = re.compile(
        rf"{stem}(?:\.(?P<before>[\w-]+?))?(?:-(?P<i>\d{{5}})-of-(?P<n>\d{{5}}))?"
        rf"(?:\.(?P<after>[\w-]+))?\.{suffix}"
    )
    index = re.compile(
        rf"{stem}(?:\.(?P<before>[\w-]+))?\.{suffix}\.index(?:\.(?P<after>[\w-]+))?\.json"
    )
    found: dict[str, _Found] = defaultdict(_Found)
    for name in sorted(names):
        if match := weights.fullmatch(name):
            here = found[match["before"] or match["after"] or FULL]
            if match["n"] is None:
                here.single = name
                continue
            shards, i = here.shards[int(match["n"])], int(match["i"])
            if i in shards:
                here.same.append((shards[i], name))
            shards[i] = name
        elif match := index.fullmatch(name):
            found[match["before"] or match["after"] or FULL].indices.append(name)
    return dict(found)


def _whole_set(found: _Found, suffix: str, where: object) -> WeightSet:
    several = [found.single] if found.single else []
    several += [min(shards.values()) for _, shards in sorted(found.shards.items())]
    if found.same:
        several = list(found.same[0])
    elif found.single and not found.shards:
        several += found.indices
    if len(several) < 2 and len(found.indices) > 1:
        several = found.indices
    if len(several) > 1:
        raise ModelError(
            f"{where} holds two sets of weights, {several[0]} and {several[1]}: expected one, take "
            f"the other away."
        )
    if found.single:
        return WeightSet([found.single])
    if not found.shards:
        raise ModelError(
            f"expected the shards that {found.indices[0]} in {where} names, found none."
        )
    ((n, shards),) = found.shards.items()
    if missing := sorted(set(range(1, n + 1)) - set(shards)):
        raise ModelError(
            f"expected {n} shards of the weights in {where}, such as {min(shards.values())}, but "
            f"number {missing[0]} is missing."
        )
    if surplus := sorted(set(shards) - set(range(1, n + 1))):
        raise ModelError(
            f"expected {n} shards of the weights in {where}, got {shards[surplus[0]]}."
        )
    if not found.indices:
        raise ModelError(
            f"expected an index (.{suffix}.index.json) beside the shards in {where}, such as "
            f"{min(shards.values())}, found none."
        )
    return WeightSet([shards[i] for i in sorted(shards)], found.indices[0])
