"""dive_fast: frozen conditional diffusion models as classifiers and detectors, fast.

>>> import dive_fast
>>> clf = dive_fast.DiffusionClassifier.from_pretrained("digits")
>>> clf("three.png")[0].label
'three'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dive_fast.accelerator import accelerate
    from dive_fast.core.head import Head
    from dive_fast.core.layouts import Layout, LayoutFormat
    from dive_fast.core.loss_weights import LossWeights
    from dive_fast.core.probes import ProbeList
    from dive_fast.core.schedule import Schedule
    from dive_fast.core.segmentation import SegmentationRule
    from dive_fast.core.threads import choose_threads
    from dive_fast.core.timesteps import TimestepWeights
    from dive_fast.engine.options import EngineOptions
    from dive_fast.errors import DataError, DiveFastError, ImageError, ModelError, RunError
    from dive_fast.models import register_model_family
    from dive_fast.predict.batches import RayClassifier
    from dive_fast.predict.calibration import Calibration
    from dive_fast.predict.classification import Classification
    from dive_fast.predict.classifier import DiffusionClassifier
    from dive_fast.predict.detections import Detections
    from dive_fast.predict.detector import LayoutDetector
    from dive_fast.predict.diagnosis import Diagnosis
    from dive_fast.predict.explanation import Explanation
    from dive_fast.predict.fitting_weights import WeightFit
    from dive_fast.predict.likelihood import Likelihood
    from dive_fast.predict.sampling import sample
    from dive_fast.predict.scores import Choice, PairScores, Retrieval, Scores
    from dive_fast.predict.scoring import ImageTextScorer
    from dive_fast.predict.segmentation import Segmentation
    from dive_fast.strategies import register_preset, register_strategy
    from dive_fast.strategies.layout import register_layout_strategy

__version__ = "0.1.0"

# Loaded when first used: the command line's --help should not wait for torch and diffusers.
_HOMES = {
    "Calibration": "dive_fast.predict.calibration",
    "Choice": "dive_fast.predict.scores",
    "Classification": "dive_fast.predict.classification",
    "DataError": "dive_fast.errors",
    "Detections": "dive_fast.predict.detections",
    "Diagnosis": "dive_fast.predict.diagnosis",
    "DiffusionClassifier": "dive_fast.predict.classifier",
    "DiveFastError": "dive_fast.errors",
    "EngineOptions": "dive_fast.engine.options",
    "Explanation": "dive_fast.predict.explanation",
    "Head": "dive_fast.core.head",
    "ImageError": "dive_fast.errors",
    "ImageTextScorer": "dive_fast.predict.scoring",
    "Layout": "dive_fast.core.layouts",
    "LayoutDetector": "dive_fast.predict.detector",
    "LayoutFormat": "dive_fast.core.layouts",
    "Likelihood": "dive_fast.predict.likelihood",
    "LossWeights": "dive_fast.core.loss_weights",
    "ModelError": "dive_fast.errors",
    "PairScores": "dive_fast.predict.scores",
    "ProbeList": "dive_fast.core.probes",
    "RayClassifier": "dive_fast.predict.batches",
    "Retrieval": "dive_fast.predict.scores",
    "RunError": "dive_fast.errors",
    "accelerate": "dive_fast.accelerator",
    "choose_threads": "dive_fast.core.threads",
    "Schedule": "dive_fast.core.schedule",
    "Segmentation": "dive_fast.predict.segmentation",
    "SegmentationRule": "dive_fast.core.segmentation",
    "Scores": "dive_fast.predict.scores",
    "TimestepWeights": "dive_fast.core.timesteps",
    "WeightFit": "dive_fast.predict.fitting_weights",
    "register_layout_strategy": "dive_fast.strategies.layout",
    "register_model_family": "dive_fast.models",
    "register_preset": "dive_fast.strategies",
    "register_strategy": "dive_fast.strategies",
    "sample": "dive_fast.predict.sampling",
}
_ROOMS = (
    "compat",
    "data",
    "errors",
    "evaluation",
    "logs",
    "models",
    "ops",
    "priors",
    "strategies",
    "training",
    "zoo",
)

__all__ = [
    "Calibration",
    "Choice",
    "Classification",
    "DataError",
    "Detections",
    "Diagnosis",
    "DiffusionClassifier",
    "DiveFastError",
    "EngineOptions",
    "Explanation",
    "Head",
    "ImageError",
    "ImageTextScorer",
    "Layout",
    "LayoutDetector",
    "LayoutFormat",
    "Likelihood",
    "LossWeights",
    "ModelError",
    "PairScores",
    "ProbeList",
    "RayClassifier",
    "Retrieval",
    "RunError",
    "Schedule",
    "Segmentation",
    "SegmentationRule",
    "Scores",
    "TimestepWeights",
    "WeightFit",
    "__version__",
    "accelerate",
    "choose_threads",
    "register_layout_strategy",
    "register_model_family",
    "register_preset",
    "register_strategy",
    "sample",
]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"dive_fast.{name}")
    raise AttributeError(f"module 'dive_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_ROOMS])
