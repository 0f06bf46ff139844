"""Runs whose images are spread over the workers of a Ray cluster; docs/ray.md."""

from __future__ import annotations

from dive_fast.evaluation.on_ray.options import RayOptions, spread
from dive_fast.evaluation.on_ray.run import run_on_ray
from dive_fast.evaluation.on_ray.work import Work

__all__ = ["RayOptions", "Work", "run_on_ray", "spread"]
