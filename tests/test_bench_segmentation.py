"""The figures and baselines of ``bench.segmentation``, against small cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.segmentation import figures, ious
from bench.segmentation_baselines import BACKGROUND, in_boxes, otsu, written_out
from dive_fast import Detections
from dive_fast.data.scenes import NAMES


def test_otsu_parts_two_levels() -> None:
    image = np.full((7, 5), 40, np.uint8)
    image[2:4, 1:] = 200
    assert 40 <= otsu(image) < 200
    assert otsu(np.full((3, 3), 9, np.uint8)) == 0


def test_a_pixel_is_of_the_box_whose_centre_is_nearest() -> None:
    boxes = [[0.0, 0.0, 10.0, 10.0], [6.0, 0.0, 16.0, 10.0]]
    found = Detections(boxes, [3, 7], [1.0, 1.0], NAMES)
    foreground = np.ones((32, 32), bool)
    foreground[9] = False
    labels = in_boxes(foreground, found)
    assert labels[4, :17].tolist() == [3] * 8 + [7] * 8 + [BACKGROUND]
    assert (labels[9] == BACKGROUND).all() and (labels[10:] == BACKGROUND).all()


def test_miou_by_hand() -> None:
    """Two pixels of 0, of which one is called 1; one of 1; the rest background, all right."""
    truth = np.full((2, 2, 3), BACKGROUND)
    truth[0, 0, :2], truth[1, 0, 0] = 0, 1
    labels = truth.copy()
    labels[0, 0, 1] = 1
    found = figures(labels, truth)
    assert found["iou"]["zero"] == 0.5 and found["iou"]["one"] == 0.5
    assert found["iou"]["background"] == 1 and np.isnan(found["iou"]["two"])
    assert found["miou"] == pytest.approx(2 / 3) and found["ink_iou"] == 1
    assert found["accuracy"] == pytest.approx(11 / 12)
    assert np.isnan(ious(np.zeros((11, 11), int))).all()


def test_attention_written_out_is_attention() -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind()
    expected, fused = (
        F.scaled_dot_product_attention(query, key, value),
        F.scaled_dot_product_attention,
    )
    with written_out() as kept:
        found = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert F.scaled_dot_product_attention is fused and kept[0].shape == (2, 4, 9, 9)
    torch.testing.assert_close(kept[0].sum(dim=-1), torch.ones(2, 4, 9))
