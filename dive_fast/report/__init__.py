"""Runs as one page that a person reads: a self-contained HTML file."""

from __future__ import annotations

from dive_fast.report.writing import write_report

__all__ = ["write_report"]
