"""A small photographic set of three groups of classes, made of COCO annotations.

    python -m bench.coco_groups --data COCO_FOLDER --out GROUPS

Large objects of COCO's photographs (4% of the picture and more) as people, vehicles and furniture;
what is smaller is left out in training, and a crowd in the tests, so that finding it is neither
right nor wrong. Pictures without a large object are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dive_fast.data.coco import CocoDataset, CocoImage, read_coco, write_coco

GROUPS = {
    "person": ("person",),
    "vehicle": ("bus", "car", "truck", "train", "motorcycle", "boat", "airplane", "bicycle"),
    "furniture": ("chair", "dining table", "couch", "bed", "bench"),
}
LARGE = 0.04  # of the picture's area


def grouped(dataset: CocoDataset, part: str) -> CocoDataset:
    """The pictures that show a large object of a group."""
    group_of = {name: g for g, names in enumerate(GROUPS.values()) for name in names}
    groups = torch.tensor([group_of.get(name, -1) for name in dataset.names])
    images = []
    for image in dataset.images:
        ids = groups[image.class_ids]
        width, height = image.size
        area = (image.boxes[:, 2:] - image.boxes[:, :2]).prod(dim=1) / (width * height)
        large = area >= LARGE
        if not bool(((ids >= 0) & large & ~image.crowd).any()):
            continue
        kept = ids >= 0 if part == "test" else (ids >= 0) & large & ~image.crowd
        crowd = image.crowd[kept] | ~large[kept]
        images.append(kept_of(image, kept, ids[kept], crowd))
    names = tuple(GROUPS)
    return CocoDataset(names, tuple(range(1, len(names) + 1)), tuple(images), f"{part}.json")


def kept_of(
    image: CocoImage, kept: torch.Tensor, ids: torch.Tensor, crowd: torch.Tensor
) -> CocoImage:
    """An image with some of its objects, of other classes."""
    return CocoImage(image.id, image.path, image.size, image.boxes[kept], ids, crowd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        dataset = read_coco(options.data / f"instances_{part}.json", options.data / "images")
        found = grouped(dataset, part)
        write_coco(options.out / f"{part}.json", found)
        n = sum(int((~image.crowd).sum()) for image in found.images)
        print(f"{part}: {len(found.images)} pictures, {n} objects")


if __name__ == "__main__":
    main()
