"""Making models: one loop, and what each trainer learns."""

from __future__ import annotations

from dive_fast.training.annotated import config_of_size, train_annotated
from dive_fast.training.augmentation import Augmentation
from dive_fast.training.classes import ClassTrainingConfig, TrainedClasses, train_classes
from dive_fast.training.layout_fitting import ExpectedDetector
from dive_fast.training.prior import fit_prior, train_layout_prior
from dive_fast.training.scenes import train_scenes
from dive_fast.training.zoo import train_zoo_model

__all__ = [
    "Augmentation",
    "ClassTrainingConfig",
    "ExpectedDetector",
    "TrainedClasses",
    "config_of_size",
    "fit_prior",
    "train_annotated",
    "train_classes",
    "train_layout_prior",
    "train_scenes",
    "train_zoo_model",
]
