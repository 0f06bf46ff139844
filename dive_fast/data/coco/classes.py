"""A detector's classes among those of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dive_fast.data.coco.dataset import CocoDataset
from dive_fast.errors import DataError, some


def class_categories(dataset: CocoDataset, names: Sequence[str]) -> tuple[int | None, ...]:
    """The COCO category of each of a detector's classes, None where the data set has none.

    Names that are not there to the letter are compared without regard to case and outer blanks.

    Raises:
        DataError: they have no class in common.
    """
    exact = dict(zip(dataset.names, dataset.category_ids, strict=True))
    known: dict[str, int] = {}
    for name, number in exact.items():
        known.setdefault(_plain(name), number)
    found = tuple(exact.get(name, known.get(_plain(name))) for name in names)
    if not any(number is not None for number in found):
        raise DataError(
            f"{dataset.source}: expected classes that the model knows, such as "
            f"{some(names)}, got {some(dataset.names) or 'none'}."
        )
    return found


def unknown_classes(dataset: CocoDataset, names: Sequence[str]) -> str | None:
    """One sentence on annotated classes that a detector does not know, None if it knows all."""
    known = set(map(_plain, names))
    boxes = Counter(c for image in dataset.images for c in image.class_ids[~image.crowd].tolist())
    missing = [c for c in sorted(boxes) if _plain(dataset.names[c]) not in known]
    if not missing:
        return None
    return (
        f"{dataset.source}: the model does not know the classes "
        f"{some([dataset.names[c] for c in missing])}; their boxes "
        f"({sum(boxes[c] for c in missing)}) count as missed."
    )


def _plain(name: str) -> str:
    return name.casefold().strip()
