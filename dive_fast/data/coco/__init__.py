"""COCO annotations: images with labelled boxes, read from JSON and written to it.

An annotation file that makes no sense is refused. A single bad entry in a good one is left out and
named in ``CocoDataset.problems``, one sentence each, and the rest is used;
``CocoDataset.tell_problems`` says them in a few lines.
"""

from dive_fast.data.coco.arrays import read_box_arrays
from dive_fast.data.coco.classes import class_categories, unknown_classes
from dive_fast.data.coco.dataset import CocoDataset, CocoImage, held_out_split, read_images
from dive_fast.data.coco.ids import Id, as_id
from dive_fast.data.coco.image_checks import expect_fitting_images, mirrored_images
from dive_fast.data.coco.reader import read_coco
from dive_fast.data.coco.writer import write_coco

__all__ = [
    "CocoDataset",
    "CocoImage",
    "Id",
    "as_id",
    "class_categories",
    "expect_fitting_images",
    "held_out_split",
    "mirrored_images",
    "read_box_arrays",
    "read_coco",
    "read_images",
    "unknown_classes",
    "write_coco",
]
