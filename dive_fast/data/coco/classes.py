"""A detector's classes among those of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dive_fast.core.names import comparable
from dive_fast.data.coco.dataset import CocoDataset
from dive_fast.data.coco.ids import Id
from dive_fast.errors import DataError, some


def class_categories(dataset: CocoDataset, names: Sequence[str]) -> tuple[Id | None, ...]:
    """The COCO category of each of a detector's classes, None where the data set has none.

    Names that are not there to the letter are compared as ``comparable`` has them, where that
    leaves one candidate: "Traffic light" is "traffic_light".

    Raises:
        DataError: they have no class in common.
    """
    exact = dict(zip(dataset.names, dataset.category_ids, strict=True))
    alike: dict[str, list[Id]] = {}
    for name, number in exact.items():
        alike.setdefault(comparable(name), []).append(number)
    found = []
    for name in names:
        candidates = [exact[name]] if name in exact else alike.get(comparable(name), [])
        found.append(candidates[0] if len(candidates) == 1 else None)
    if not any(number is not None for number in found):
        raise DataError(
            f"{dataset.source}: expected classes that the model knows, such as "
            f"{some(names)}, got {some(dataset.names) or 'none'}."
        )
    return tuple(found)


def unknown_classes(dataset: CocoDataset, names: Sequence[str]) -> str | None:
    """One sentence on annotated classes that a detector does not know, None if it knows all.

    Raises:
        DataError: they have no class in common.
    """
    known = set(class_categories(dataset, names))
    boxes = Counter(c for image in dataset.images for c in image.class_ids[~image.crowd].tolist())
    missing = [c for c in sorted(boxes) if dataset.category_ids[c] not in known]
    if not missing:
        return None
    return (
        f"{dataset.source}: the model does not know the classes "
        f"{some([dataset.names[c] for c in missing])}; their boxes "
        f"({sum(boxes[c] for c in missing)}) count as missed."
    )
