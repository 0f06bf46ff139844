"""The memory that tasks need, in a process of their own: ``python memory_child.py FOLDER``.

Prints how far the largest resident size grows, over the bytes of the result, and these bytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import SD3Transformer2DModel

from dive_fast.core import vocabulary
from dive_fast.models.files.checkpoint import load_component
from dive_fast.models.text.pipeline_text import PipelineText
from dive_fast.models.text.prompts import ClassPrompts

CPU = torch.device("cpu")
CLASSES, TOKENS, WIDTH = 1000, 100, 2000  # a table of 400 MB in float16


def status(key: str) -> int:
    """VmRSS or VmHWM, the largest, in bytes.

    What getrusage says begins with the size of the process that started this one.
    """
    content = Path("/proc/self/status").read_text()
    return int(content.split(f"{key}:")[1].split()[0]) * 1024


def measured(task: Callable[[], int]) -> tuple[float, int]:
    """The growth of the largest size while it runs, over the bytes that it says, and these."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would not be taken again
    Path("/proc/self/clear_refs").write_text("5")  # the largest size is that of now
    before = status("VmRSS")
    size = task()
    return (status("VmHWM") - before) / size, size


def load(directory: Path, dtype: torch.dtype = torch.float32) -> int:
    """A network."""
    network = load_component(SD3Transformer2DModel, directory, False, dtype=dtype)
    return sum(p.nbytes for p in network.parameters())


def table() -> int:
    """A vocabulary of prompts, made and searched."""

    def encode(pipeline, prompts, device):
        rows = [torch.full((TOKENS, WIDTH), float(len(prompt))) for prompt in prompts]
        return {"sequence": torch.stack(rows)}

    text = PipelineText(SimpleNamespace(config={}), encode)
    classes = ClassPrompts.make({f"class {i}": "a" * (i + 1) for i in range(CLASSES)})
    rows = text.table(classes, CPU)
    found = vocabulary.Vocabulary(rows, classes.names, torch.zeros(text.dim))
    assert found.table.dtype == torch.float16 and found.table.data_ptr() == rows.data_ptr()
    v0 = found.mean()
    assert v0[0] == (1 + CLASSES) / 2
    # Row c is c + 1 throughout.
    expected = (torch.arange(CLASSES) + 1 - v0[0]) * text.dim
    # A million equal numbers are the worst that can be summed in float32.
    torch.testing.assert_close(found.linear(v0, torch.ones(text.dim)), expected, rtol=0.02, atol=0)
    assert found.nearest(torch.full((1, text.dim), 30.2)).tolist() == [29]
    assert abs(found.spread()[0] - (1 + CLASSES) / 2) < 1
    return found.table.nbytes


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    vocabulary.FLOAT32_BYTES = 1 << 20
    load(folder / "small")  # what is imported on the way
    tasks = {
        "float32": lambda: load(folder / "float32"),
        "float16": lambda: load(folder / "float16", torch.float16),
        "table": table,
    }
    print(json.dumps({name: measured(task) for name, task in tasks.items()}))
