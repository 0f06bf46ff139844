"""Runs the strategies of many images at once over one network, in full batches."""

from __future__ import annotations

from dive_fast.engine.engine import Engine, EngineRecord, Finished
from dive_fast.engine.options import EngineOptions
from dive_fast.engine.running import Job

__all__ = ["Engine", "EngineOptions", "EngineRecord", "Finished", "Job"]
