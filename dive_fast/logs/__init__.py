"""Figures of a run as they come, in TensorBoard, Weights & Biases or Trackio."""

from __future__ import annotations

from dive_fast.logs.choice import LOGGERS, check_log_to, logging_to
from dive_fast.logs.protocol import Logger, LogTo

__all__ = ["LOGGERS", "LogTo", "Logger", "check_log_to", "logging_to"]
