"""Omniglot, small background sets: 242 handwritten characters, each by 20 drawers.

Source: B. Lake, R. Salakhutdinov, J. Tenenbaum, Science 2015 (MIT), the union of
``images_background_small1`` and ``small2``, averaged to 32 x 32 pixels, light ink on a dark ground.
The file is an ``.npz`` with ``x`` uint8 [N, 32, 32], ``y`` the character, ``drawer`` 1 to 20 and
``classes``, one name per character.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dive_fast.data.npz import LabelledImages, checked_names, read_arrays
from dive_fast.errors import DataError

LAST_TRAIN_DRAWER = 15
ARRAYS = ("x", "y", "drawer", "classes")


def load_omniglot(path: str | Path, part: str) -> LabelledImages:
    """``"train"`` is drawers 1 to 15 of every character, ``"test"`` the drawers 16 to 20.

    Raises:
        DataError: no such file, or not one of Omniglot.
    """
    images, labels, drawers, classes = read_arrays(path, ARRAYS, (32, 32))
    if len(drawers) != len(images):
        raise DataError(f"{path}: expected a drawer per image, got {len(drawers)}.")
    names = checked_names(path, "classes", classes)
    if len(labels) and int(labels.max()) >= len(classes):
        raise DataError(f"{path}: expected labels below {len(classes)}, got {labels.max()}.")
    chosen = (drawers <= LAST_TRAIN_DRAWER) == (part == "train")
    return LabelledImages(images[chosen], labels[chosen].astype(np.int64), names)
