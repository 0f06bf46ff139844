"""The handwritten digits of scikit-learn: 1,797 images of 8 x 8 pixels, ten classes.

Source: the UCI "Optical Recognition of Handwritten Digits" test part (E. Alpaydin, C. Kaynak),
as ``sklearn.datasets.load_digits`` ships it. Ink is light on a dark ground.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dive_fast.errors import DataError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_SEED = 0
N_TRAIN = 1400


class Digits(NamedTuple):
    """One part of the split: images uint8 [N, 8, 8], labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray


def load_digits(part: str) -> Digits:
    """The fixed split: ``"train"`` is 1,400 digits, ``"test"`` the 397 held out.

    Raises:
        DataError: another part is asked for, or scikit-learn is not installed.
    """
    if part not in ("train", "test"):
        raise DataError(f"the digits have the parts 'train' and 'test', got {part!r}.")
    try:
        from sklearn.datasets import load_digits as load_sklearn_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install 'dive_fast[demo]'."
        ) from error
    bunch = load_sklearn_digits()
    # 0..16 grey levels become the 0..255 of an ordinary image, so that a digit saved as PNG and
    # read back is the same input.
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    chosen = order[:N_TRAIN] if part == "train" else order[N_TRAIN:]
    return Digits(images[chosen], bunch.target[chosen].astype(np.int64))
