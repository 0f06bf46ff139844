"""The ops of diffusion classification, each with a plain-torch reference and compiled kernels.

They are ordinary torch ops (namespace `torch.ops.dive_fast`), so autograd, `torch.compile` and
fake tensors know them; the functions here check their arguments and call them.
"""

from __future__ import annotations

from dive_fast.ops import _native
from dive_fast.ops._library import OpStatus, native_status
from dive_fast.ops._nearest_box import nearest_box, snap_boxes
from dive_fast.ops._nearest_row import METRICS, nearest_row, projection
from dive_fast.ops._noise_prediction_loss import (
    NORMS,
    TARGETS,
    noise_prediction_error_map,
    noise_prediction_loss,
)
from dive_fast.ops._q_sample import q_sample

_native.load()

__all__ = [
    "METRICS",
    "NORMS",
    "TARGETS",
    "OpStatus",
    "native_status",
    "nearest_box",
    "nearest_row",
    "noise_prediction_error_map",
    "noise_prediction_loss",
    "projection",
    "q_sample",
    "snap_boxes",
]
