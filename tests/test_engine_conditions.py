"""How conditions get to the network: only those of the batch, classes by their index."""

from __future__ import annotations

import pytest
import torch
from tiny_transformer import make_dit
from toy_model import ToyModel

from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Answer, ErrorMaps, Gradients, Losses
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.engine import Engine, EngineOptions, Job
from dive_fast.engine import classes as class_table
from dive_fast.engine.classes import ClassTable
from dive_fast.engine.objective import Objective
from dive_fast.engine.packing import pack, to_batch
from dive_fast.engine.running import Running
from dive_fast.errors import DiveFastError

CPU = torch.device("cpu")
PROBES = torch.tensor([4, 0, 2])


def asks(request):
    reply = yield request
    return Answer(0, torch.zeros(6), torch.zeros(6, dtype=torch.int64), {"reply": reply})


def running(number: int, request, done_rows: int = 0) -> Running:
    image = Running(number, Job(number, torch.zeros(1, 2, 2), asks(request)), n_classes=1000)
    image.resume()
    image.done_rows = done_rows
    return image


@pytest.mark.parametrize("batch_size", [1, 8, 30, 3000])
@pytest.mark.parametrize("start", [0, 996])
def test_a_batch_has_no_more_conditions_than_its_rows_name(batch_size, start):
    """A thousand classes, a few relaxed conditions, and rows that begin anywhere in a request."""
    v = torch.arange(35.0).view(7, 5)
    order = torch.arange(1000).flip(0)
    images = [
        running(0, Losses(order, PROBES), start),
        running(1, Losses(v, PROBES), 5),
        running(2, Losses(torch.tensor([7]), PROBES)),
    ]
    batch = to_batch(pack(images, (Losses,), batch_size), CPU)
    rows = list(
        zip(batch.image_index.tolist(), batch.position[batch.condition_index].tolist(), strict=True)
    )
    assert len(rows) == min(batch_size, 3000 - start + 16 + 3)
    assert len(batch.classes) == len(batch.position) == len(set(rows))
    # Every row's condition is the one that its image's request has in this place.
    relaxed = iter([] if batch.relaxed is None else batch.relaxed)
    embeddings = [next(relaxed) if c < 0 else None for c in batch.classes.tolist()]
    assert next(relaxed, None) is None
    for row, (image, position) in enumerate(rows):
        i = batch.condition_index[row]
        if batch.image_numbers[image] == 1:
            assert torch.equal(embeddings[i], v[position])
        else:
            asked = order if batch.image_numbers[image] == 0 else torch.tensor([7])
            assert batch.classes[i] == asked[position]


def replies(model, requests, options=None, batch_size=100):
    probes = low_discrepancy_probes(6, 1000, model.latent_shape)
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(len(requests), *model.latent_shape, generator=generator)
    jobs = [
        Job(i, x, asks(request)) for i, (x, request) in enumerate(zip(x0, requests, strict=True))
    ]
    found = Engine(model, batch_size, options=options).run(jobs, probes, Objective())
    return [f.answer.trace["reply"] for f in sorted(found, key=lambda f: f.key)]


@pytest.fixture(scope="module", params=["toy", "off", "exact"])
def model_and_options(request):
    if request.param == "toy":
        return ToyModel(), None
    model = make_dit()
    return model, EngineOptions(cache=request.param)


@pytest.mark.parametrize("kind", [Losses, Gradients, ErrorMaps])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_a_class_is_its_embedding(model_and_options, kind, batch_size):
    """Beside relaxed conditions in the same batch, and twice in one request."""
    model, options = model_and_options
    table = model.vocabulary.table
    index = [torch.tensor([3, 0, 3]), torch.tensor([4]), torch.tensor([0, 1])]
    relaxed = torch.randn(2, table.shape[1], generator=torch.Generator().manual_seed(1))
    named = [kind(index[0], PROBES), kind(relaxed, PROBES), *(kind(i, PROBES) for i in index[1:])]
    plain = [kind(v, PROBES) for v in (table[index[0]], relaxed, table[index[1]], table[index[2]])]
    for a, b in zip(
        replies(model, named, options, batch_size),
        replies(model, plain, options, batch_size),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        if kind is Gradients:
            assert a.gradients.shape == (len(a.losses), table.shape[1]) and a.exact


def test_parts_of_classes_are_counted_through():
    vocabulary = Vocabulary(torch.arange(12.0).view(2, 6), "ab", parts=3)
    table = ClassTable(vocabulary, CPU)
    assert len(table) == 6
    assert table.take(torch.tensor([5, 0])).tolist() == [[10, 11], [0, 1]]


def test_the_table_is_copied_to_the_device_once_and_leaves_it(monkeypatch):
    vocabulary, index = Vocabulary(torch.rand(4, 3), "abcd"), torch.tensor([2, 2])
    meta = torch.device("meta")
    table = ClassTable(vocabulary, meta)
    assert not table.release(), "nothing is copied before a class is asked for"
    table = ClassTable(vocabulary, meta)
    assert table.take(index).device == meta and table.take(index).shape == (2, 3)
    assert table.release() and not table.release()
    assert table.take(index).device == meta
    monkeypatch.setattr(class_table, "TABLE_BYTES", vocabulary.table.nbytes - 1)
    large = ClassTable(vocabulary, meta)
    assert large.take(index).device == meta
    assert not large.release(), "a table above the bound stays where it is"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_table_that_does_not_fit_stays_on_the_cpu(error):
    table = ClassTable(Vocabulary(torch.eye(3), "abc"), CPU)

    def refuse(*arguments):
        raise error("no memory" if error is torch.OutOfMemoryError else "device-side assert")

    table.rows.to = refuse
    if error is RuntimeError:
        with pytest.raises(RuntimeError, match="device-side assert"):
            table.take(torch.tensor([1]))
    else:
        assert table.take(torch.tensor([1])).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("conditions", "got"),
    [
        (torch.tensor([0, 6]), r"int64 \[2\] from 0 to 6"),
        (torch.tensor([-1]), r"int64 \[1\] from -1 to -1"),
        (torch.tensor([1], dtype=torch.int32), r"int32 \[1\]"),
        (torch.tensor([True]), r"bool \[1\]"),
        (torch.tensor([[1, 2]]), r"int64 \[1, 2\]"),
        (torch.zeros(18), r"float32 \[18\]"),
    ],
)
def test_bad_conditions(conditions, got):
    message = rf"must be int64 \[n\] of \[0, 6\) or float \[n, D\], got {got}\."
    with pytest.raises(DiveFastError, match=message):
        replies(ToyModel(), [Losses(conditions, PROBES)])
