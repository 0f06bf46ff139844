"""Everything that is read from disk: images, labels, boxes."""

from __future__ import annotations

from dive_fast.data.class_lists import read_classes
from dive_fast.data.corruptions import Corruption, corrupted, read_corruptions
from dive_fast.data.examples import DataSet, Example
from dive_fast.data.known_lists import known_classes, known_templates
from dive_fast.data.labelled import folder_classes, load_all, open_dataset, select
from dive_fast.data.torch_sets import from_torch

__all__ = [
    "Corruption",
    "DataSet",
    "Example",
    "corrupted",
    "folder_classes",
    "from_torch",
    "known_classes",
    "known_templates",
    "load_all",
    "open_dataset",
    "read_classes",
    "read_corruptions",
    "select",
]
