"""Runs over labelled data that are written as they go and resumed where they stopped."""

from __future__ import annotations

from dive_fast.evaluation.classification import evaluate
from dive_fast.evaluation.corruptions import CorruptionTable, evaluate_corruptions
from dive_fast.evaluation.detection import (
    DetectionSummary,
    evaluate_detections,
    summarise_detections,
)
from dive_fast.evaluation.generators import GeneratorComparison, compare_generators
from dive_fast.evaluation.on_ray import RayOptions
from dive_fast.evaluation.rundir import RunDirectory, read_records
from dive_fast.evaluation.summary import Summary, summarise
from dive_fast.evaluation.task_scores import TaskSummary
from dive_fast.evaluation.tasks import evaluate_task

__all__ = [
    "CorruptionTable",
    "DetectionSummary",
    "GeneratorComparison",
    "RayOptions",
    "RunDirectory",
    "Summary",
    "TaskSummary",
    "compare_generators",
    "evaluate",
    "evaluate_corruptions",
    "evaluate_detections",
    "evaluate_task",
    "read_records",
    "summarise",
    "summarise_detections",
]
