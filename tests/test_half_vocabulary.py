"""Large tables of classes in half precision: the same answers, and no float32 copy of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flow_families import make_pixels
from tiny_aura import write_aura

from dive_fast import DiffusionClassifier, ModelError
from dive_fast.core import memory, vocabulary
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.engine.classes import ClassTable
from dive_fast.models import load_model
from dive_fast.models.text.pipeline_text import PipelineText
from dive_fast.models.text.prompts import ClassPrompts
from dive_fast.predict.sampling import sample

CPU = torch.device("cpu")
CLASSES = ["cat", "big dog", "bird"]


@pytest.fixture
def small_limits(monkeypatch) -> None:
    """Every table is large, and has several blocks."""
    monkeypatch.setattr(vocabulary, "FLOAT32_BYTES", 16)
    monkeypatch.setattr(vocabulary, "BLOCK_BYTES", 200)


@pytest.fixture(scope="module")
def aura(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_aura(tmp_path_factory.mktemp("aura") / "model")


def rows(dtype: torch.dtype) -> torch.Tensor:
    """[23, 9]; blocks of 200 bytes hold 5 rows."""
    table = torch.randn(23, 9, generator=torch.Generator().manual_seed(0))
    table[17] = table[4]  # a tie
    return table.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_computed_of_a_table(small_limits, dtype: torch.dtype) -> None:
    table, extra = rows(dtype), torch.linspace(-3, 5, 9)
    found = Vocabulary(table, [str(i) for i in range(23)], extra)
    assert found.table.dtype == dtype
    exact, close = table.double(), {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.mean().double(), exact.mean(dim=0), **close)
    entries = torch.cat([exact, extra.double()[None]])
    assert found.spread() == pytest.approx((entries.mean().item(), entries.std().item()), rel=1e-5)
    g, v = torch.linspace(-1, 2, 9), torch.linspace(0, 1, 9)
    linear = (exact - v.double()) @ g.double()
    torch.testing.assert_close(found.linear(v, g).double(), linear, **close)
    distances = (exact - v.double()).norm(dim=1)
    torch.testing.assert_close(found.distances(v).double(), distances, **close)
    queries = torch.cat([table.float()[[22, 17, 0]] * 1.01, v[None]])
    for metric in ("l2", "cosine"):
        if metric == "l2":
            far = (queries.double()[:, None] - exact).norm(dim=2)
        else:
            far = -torch.nn.functional.cosine_similarity(queries.double()[:, None], exact, dim=2)
        nearest = found.nearest(queries, metric)
        assert torch.equal(nearest, far.argmin(dim=1)) and nearest[1] == 4  # not 17
    assert found.rows(torch.tensor([3, 1])).dtype == torch.float32
    assert torch.equal(found.rows([3, 1]), table[[3, 1]].float())
    taken = ClassTable(found, CPU).take(torch.tensor([3, 1]))
    assert taken.dtype == torch.float32 and torch.equal(taken, table[[3, 1]].float())
    assert torch.equal(found.table, table)  # nothing has written into it


def test_small_tables_are_float32() -> None:
    assert Vocabulary(rows(torch.float16), [str(i) for i in range(23)]).table.dtype == torch.float32
    assert vocabulary.is_large(1000, 333 * 4096 + 2048)  # Stable Diffusion 3
    assert not vocabulary.is_large(1000, 77 * 2048 + 1280)  # SDXL
    assert not vocabulary.is_large(1 << 18, 1 << 10) and vocabulary.is_large(1 + (1 << 18), 1 << 10)


def test_answers_are_those_of_float32(aura: Path, small_limits, monkeypatch) -> None:
    pixels, found = make_pixels(), {}
    for limit in (1 << 30, 16):
        monkeypatch.setattr(vocabulary, "FLOAT32_BYTES", limit)
        clf = DiffusionClassifier.from_pretrained(aura, classes=CLASSES, device="cpu")
        found[limit] = [
            clf(pixels, strategy=strategy, probes=8)[0]
            for strategy in ("enumerate", "auto", "invert", "race")
        ]
        found[limit].append(sample(clf.model, [0, 2], steps=2))
    assert clf.model.vocabulary.table.dtype == torch.float16
    for full, half in zip(found[1 << 30][:4], found[16][:4], strict=True):
        assert half.label == full.label
        torch.testing.assert_close(half.losses, full.losses, rtol=1e-3, atol=0, equal_nan=True)
    torch.testing.assert_close(found[16][4], found[1 << 30][4], rtol=1e-2, atol=1e-2)


def test_float16_moves_predictions_less_than_bfloat16(aura: Path) -> None:
    # In double precision: the network's own rounding would be more.
    model = load_model(aura, classes=CLASSES, device="cpu").to(CPU, torch.float64)
    x_t = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t, table = torch.tensor([100, 500, 900]), model.vocabulary.table
    with torch.no_grad():
        exact = model.predict(x_t, t, table)
        error = {
            dtype: ((model.predict(x_t, t, table.to(dtype).float()) - exact).norm() / exact.norm())
            for dtype in (torch.float16, torch.bfloat16)
        }
    assert 0 < error[torch.float16] < error[torch.bfloat16] / 3
    assert error[torch.float16] < 1e-4


@pytest.mark.parametrize("average", ["embedding", "loss"])
def test_tables_of_prompts(aura: Path, small_limits, monkeypatch, average: str) -> None:
    text = load_model(aura, classes=CLASSES, device="cpu").text
    groups = {"a": ["a cat", "a dog", "the cat"], "b": ["a bird", "a cat", "a"]}
    classes = ClassPrompts.make(groups, average=average)
    half = text.table(classes, CPU)
    monkeypatch.setattr(vocabulary, "FLOAT32_BYTES", 1 << 30)
    full = text.table(classes, CPU)
    assert (half.dtype, full.dtype) == (torch.float16, torch.float32)
    for row, prompts in zip(full, groups.values(), strict=True):
        alone = torch.cat([text.encode([prompt], CPU) for prompt in prompts])
        expected = alone.mean(dim=0) if average == "embedding" else alone.flatten()
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half.float(), full, rtol=1e-3, atol=1e-5)


def lengths(pipeline: object, prompts: list[str], device: torch.device) -> dict:
    """10^length of a prompt, and its mask."""
    sizes = torch.tensor([float(len(prompt)) for prompt in prompts])
    return {"sequence": 10.0 ** sizes[:, None, None].expand(-1, 3, 4), "mask": torch.ones(1, 3)}


def sized(pipeline: object, prompts: list[str], device: torch.device) -> dict:
    parts = lengths(pipeline, prompts, device)
    return {"sequence": parts["sequence"], "mask": parts["mask"].expand(len(prompts), -1)}


def test_numbers_beyond_float16_are_kept_in_bfloat16(small_limits) -> None:
    text = PipelineText(SimpleNamespace(config={}), sized)
    table = text.table(ClassPrompts.make({"a": "1", "b": "12", "c": "12345", "d": "123"}), CPU)
    assert table.dtype == torch.bfloat16
    expected = torch.tensor([[10.0], [100.0], [1e5], [1000.0]]).expand(-1, 12)
    torch.testing.assert_close(table[:, :12].float(), expected, rtol=4e-3, atol=0)
    assert (table[:, 12:] == 1).all()


def test_twins_are_refused_in_half_precision_too(small_limits) -> None:
    text = PipelineText(SimpleNamespace(config={}), sized)
    with pytest.raises(ModelError, match="classes 'a' and 'c' are the same"):
        text.table(ClassPrompts.make({"a": "12", "b": "123", "c": "21"}), CPU)


def test_tables_beyond_the_memory_are_refused_first(small_limits, monkeypatch) -> None:
    text = PipelineText(SimpleNamespace(config={}), sized)
    asked = []
    monkeypatch.setattr(text, "_encode_prompts", asked.append)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * 2 * 15 - 1)
    with pytest.raises(ModelError, match=r"of 2 classes take 0.0 GB \(2 rows of 15 numbers\)"):
        text.table(ClassPrompts.make({"a": "1", "b": "12"}), CPU)
    assert not asked
