"""Making models: one loop, and what each trainer learns."""

from __future__ import annotations

from dive_fast.training.annotated import train_annotated
from dive_fast.training.augmentation import Augmentation
from dive_fast.training.classes import ClassTrainingConfig, TrainedClasses, train_classes
from dive_fast.training.prior import train_layout_prior
from dive_fast.training.scenes import train_scenes
from dive_fast.training.zoo import train_zoo_model

__all__ = [
    "Augmentation",
    "ClassTrainingConfig",
    "TrainedClasses",
    "train_annotated",
    "train_classes",
    "train_layout_prior",
    "train_scenes",
    "train_zoo_model",
]
