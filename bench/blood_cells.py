"""Cuts the images of BCCD into tiles, a data set that small models on a CPU can learn.

    python -m bench.blood_cells --data BCCD_FOLDER --out TILES
    dive-fast train-layout --annotations TILES/train.json --images TILES/images \
        --max-objects 8 --out MODEL
    dive-fast evaluate --data TILES/test.json --images TILES/images --model MODEL --out RUN

An image of 640 x 480 becomes six tiles of 240 x 240, three in a row that overlap by 40 pixels; a
training image fifteen, five in a row, so that cells are learned wherever they lie in a tile.
Of the cells that a tile cuts, those that lie in it by 60% and more are annotated, cut at its
border; those that lie in it by 25% to 60% are annotated in training tiles, so that the layout says
what is seen, and marked as crowds in the others, so that finding them is neither right nor wrong;
the rest is left out. The official split stays: tiles of a test image are test tiles.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.bccd import PARTS, load_bccd
from dive_fast.data.coco import CocoDataset, CocoImage, write_coco

SIDE = 240
LEFTS, TOPS = (0, 200, 400), (0, 240)
TRAINING_LEFTS, TRAINING_TOPS = (0, 100, 200, 300, 400), (0, 120, 240)
WHOLE, IN_PART = 0.6, 0.25  # shares of a cell's area


def cut(image: CocoImage, left: int, top: int, number: int, path: Path, whole: float) -> CocoImage:
    """The annotations of one tile; cells below a share of ``whole`` are crowds."""
    corner = torch.tensor([left, top, left, top])
    inside = (image.boxes - corner).clamp(0, SIDE)
    share = area(inside) / area(image.boxes).clamp(min=1)
    kept = share >= IN_PART
    return CocoImage(
        id=number,
        path=path,
        size=(SIDE, SIDE),
        boxes=inside[kept],
        class_ids=image.class_ids[kept],
        crowd=image.crowd[kept] | (share[kept] < whole),
    )


def area(boxes: torch.Tensor) -> torch.Tensor:
    """[n], of boxes [n, 4]."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


def write_tiles(dataset: CocoDataset, out: Path, part: str) -> CocoDataset:
    """Writes the images of all tiles to ``out/images`` and ``out/PART.json``."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    tiles: list[CocoImage] = []
    training = part == "train"
    whole = IN_PART if training else WHOLE
    lefts, tops = (TRAINING_LEFTS, TRAINING_TOPS) if training else (LEFTS, TOPS)
    for image in dataset.images:
        picture = image.read()
        for top in tops:
            for left in lefts:
                path = out / "images" / f"{image.path.stem}_{left}_{top}.png"
                picture.crop((left, top, left + SIDE, top + SIDE)).save(path)
                tiles.append(cut(image, left, top, len(tiles) + 1, path, whole))
    found = CocoDataset(dataset.names, dataset.category_ids, tuple(tiles), f"{part}.json")
    write_coco(out / f"{part}.json", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the folder with instances_train.json")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    for part in PARTS:
        tiles = write_tiles(load_bccd(options.data, part), options.out, part)
        counts = torch.tensor([int((~image.crowd).sum()) for image in tiles.images])
        print(
            f"{part}: {len(tiles.images)} tiles, {int(counts.sum())} cells, "
            f"{counts.double().mean():.1f} a tile, {int(counts.max())} at most, "
            f"{int((counts > 8).sum())} tiles with more than 8"
        )


if __name__ == "__main__":
    main()
