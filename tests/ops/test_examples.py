"""The examples in the ops' documentation run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("_library", "_nearest_box", "_nearest_row", "_noise_prediction_loss", "_q_sample")


@pytest.mark.parametrize("module", MODULES)
def test_documented_examples(module):
    result = doctest.testmod(importlib.import_module(f"dive_fast.ops.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
