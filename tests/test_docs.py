"""The Python of README.md and docs/ runs as it stands there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

from dive_fast import DiffusionClassifier
from dive_fast.models import _FAMILIES
from dive_fast.strategies import base
from dive_fast.zoo.digits import load_digits

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/strategies.md", "docs/models.md", "docs/timesteps.md")


def snippets() -> list:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.S | re.M)
        for i, (_, code) in enumerate(blocks):
            found.append(pytest.param(textwrap.dedent(code), id=f"{page}-{i}"))
    return found


def test_every_page_has_code():
    ids = [p.id for p in snippets()]
    assert all(any(i.startswith(page) for i in ids) for page in PAGES)


@pytest.mark.parametrize("code", snippets())
def test_code_runs(code, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_STRATEGIES", dict(base._STRATEGIES))
    monkeypatch.setitem(_FAMILIES, "MyPipeline", None)
    held_out = load_digits("test")
    Image.fromarray(held_out.images[0]).save("three.png")
    clf = DiffusionClassifier.from_pretrained("digits")
    names = {
        "clf": clf,
        "images": held_out.images[:1],
        "labels": held_out.labels[:1],
        "x0": clf.encode(held_out.images[:1]),
        "my_noise": torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        "load": lambda directory, **options: None,
    }
    exec(compile(code, "<docs>", "exec"), names)
    if "halving" in code:
        assert clf(names["images"], strategy="halving")[0].n_probes.min() == 10
