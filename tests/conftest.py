"""One thread per test: on small tensors a second one costs more than it brings, and where other
work shares the cores it costs milliseconds per operation."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
