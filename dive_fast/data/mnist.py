"""MNIST: 70,000 handwritten digits of 28 x 28 pixels, ten classes, light ink on a dark ground.

Source: Y. LeCun, C. Cortes, C. Burges (CC BY-SA 3.0). The file is an ``.npz`` with ``x_train``,
``y_train``, ``x_test`` and ``y_test``, as Keras and others distribute it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dive_fast.data.digits import NAMES
from dive_fast.data.npz import LabelledImages, read_arrays

__all__ = ["NAMES", "load_mnist"]


def load_mnist(path: str | Path, part: str) -> LabelledImages:
    """The official split: ``"train"`` 60,000 images, ``"test"`` 10,000.

    Raises:
        DataError: no such file, or not one of MNIST.
    """
    images, labels = read_arrays(path, (f"x_{part}", f"y_{part}"), (28, 28))
    return LabelledImages(images, labels.astype(np.int64), NAMES)
