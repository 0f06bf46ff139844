"""What a fresh process needs: ``python memory_child.py TASK ...``.

Prints the growth of the largest resident size over the bytes of the result, and these bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

CPU = torch.device("cpu")
CLASSES, TOKENS, WIDTH = 1000, 100, 2000  # a table of 400 MB in float16


def peak() -> int:
    """Bytes; what getrusage says begins with the size of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def load(directory: str, small: str, dtype: str) -> None:
    """A network."""
    from diffusers import SD3Transformer2DModel

    from dive_fast.models.files.checkpoint import load_component

    load_component(SD3Transformer2DModel, Path(small), False)  # what is imported on the way
    before = peak()
    network = load_component(
        SD3Transformer2DModel, Path(directory), False, dtype=getattr(torch, dtype)
    )
    told(peak() - before, sum(p.nbytes for p in network.parameters()))


def table() -> None:
    """A vocabulary of prompts, made and searched."""
    from dive_fast.core import vocabulary
    from dive_fast.models.text.pipeline_text import PipelineText
    from dive_fast.models.text.prompts import ClassPrompts

    def encode(pipeline, prompts, device):
        rows = [torch.full((TOKENS, WIDTH), float(len(prompt))) for prompt in prompts]
        return {"sequence": torch.stack(rows)}

    vocabulary.FLOAT32_BYTES = 1 << 20
    text = PipelineText(SimpleNamespace(config={}), encode)
    classes = ClassPrompts.make({f"class {i}": "a" * (i + 1) for i in range(CLASSES)})
    before = peak()
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
    told(peak() - before, found.table.nbytes)


def told(taken: int, size: int) -> None:
    print(taken / size, size)


if __name__ == "__main__":
    {"load": load, "table": table}[sys.argv[1]](*sys.argv[2:])
