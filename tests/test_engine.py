"""The engine: packing changes neither answers nor costs, and memory that runs out only slows it."""

from __future__ import annotations

import pytest
import torch
from tiny_transformer import make_dit
from toy_model import ToyModel

from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Answer, Gradients, Losses
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.strategies import (
    AdaptiveEnumerate,
    Auto,
    DivePaper,
    Enumerate,
    Invert,
    Race,
    Task,
)

STRATEGIES = {
    "enumerate": (Enumerate(), 40),
    "adaptive": (AdaptiveEnumerate(n_samples=(5, 20), to_keep=(3, 1)), None),
    "race": (Race(min_probes=5, round_probes=5), 40),
    "stages": (Race(stages=((5, 3), (20, 1))), 40),
    "auto": (Auto(shortlist=2, gradient_probes=5), 40),
    "invert": (Invert(search_probes=10), 40),
    "dive-paper": (DivePaper(loops=3, batch_size=10, learning_rate=0.3), 40),
}


@pytest.fixture(scope="module", params=["toy", "dit"])
def toy_or_dit(request):
    if request.param == "toy":
        return ToyModel()
    return make_dit()


def run(model, name, latents, batch_size):
    strategy, k = STRATEGIES[name]
    probes = strategy.probes(k, 1000, model.latent_shape, 0)
    task = Task(model.vocabulary, probes)
    jobs = [Job(i, x0, strategy.search(task)) for i, x0 in enumerate(latents)]
    finished = list(Engine(model, batch_size).run(jobs, probes, Objective()))
    assert sorted(f.key for f in finished) == list(range(len(latents)))
    return sorted(finished, key=lambda f: f.key)


@pytest.mark.parametrize("name", STRATEGIES)
def test_images_together_equal_images_alone_at_every_batch_size(toy_or_dit, name):
    n = 9 if isinstance(toy_or_dit, ToyModel) else 4  # the network is slow row by row
    latents = torch.randn(n, *toy_or_dit.latent_shape, generator=torch.Generator().manual_seed(5))
    alone = [run(toy_or_dit, name, latents[i : i + 1], 64)[0] for i in range(len(latents))]
    if isinstance(toy_or_dit, ToyModel):
        assert len({f.answer.index for f in alone}) > 2, "images that differ, or this says little"
    for batch_size in (1, 7, 64):
        together = run(toy_or_dit, name, latents, batch_size)
        for a, b in zip(alone, together, strict=True):
            assert a.answer.index == b.answer.index
            assert a.evaluations == b.evaluations
            # The same rows in another batch: fp32 sums in another order.
            torch.testing.assert_close(
                a.answer.losses, b.answer.losses, rtol=1e-4, atol=1e-5, equal_nan=True
            )


def test_batches_are_full_until_the_images_run_out():
    model = ToyModel()
    run(model, "invert", torch.randn(40, *model.latent_shape), 32)
    full = [rows == 32 for rows in model.rows]
    # Only the tail may fall short: what is left of each kind of request when no image waits.
    assert all(full[: int(0.8 * len(full))])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_stream_of_many_images_fills_its_batches(name):
    """19 rows in 20 are used: images refill a batch as others finish or wait for their strategy."""
    model, (strategy, k) = ToyModel(), STRATEGIES[name]
    probes = strategy.probes(k, 1000, model.latent_shape, 0)
    task = Task(model.vocabulary, probes)
    # The last images of many rounds leave more batches short.
    n = 300 if name == "auto" else 120
    x0 = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    engine = Engine(model, 64)
    found = list(
        engine.run(
            [Job(i, x, strategy.search(task)) for i, x in enumerate(x0)], probes, Objective()
        )
    )
    record = engine.record
    assert record.fill_rate >= 0.95
    assert record.rows == sum(model.rows) and record.batches == len(model.rows)
    assert record.capacity_rows == 64 * record.batches
    assert record.evaluations == sum(f.evaluations for f in found)
    assert record.to_dict()["fill_rate"] == record.fill_rate and record.seconds > 0


def asks(model, *requests):
    for request in requests:
        _ = yield request
    return Answer(0, torch.zeros(6), torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["one large request", "many requests", "other kind"])
def test_an_image_that_needs_many_more_rows_blocks_no_other(kind):
    """The others finish within twice the batches that they take alone, and batches stay full."""
    model = ToyModel()
    classes, probes = torch.arange(6), low_discrepancy_probes(300, 1000, model.latent_shape)
    small_kind = Gradients if kind == "other kind" else Losses

    def small():
        part = torch.arange(4)
        return asks(model, *(small_kind(classes, part + 4 * i) for i in range(3)))

    def large():
        parts = torch.arange(300).split(2 if kind == "many requests" else 300)
        return asks(model, *(Losses(classes.repeat(3), part) for part in parts))

    def batches_until_the_small_are_done(jobs):
        engine = Engine(model, 48)
        for n, finished in enumerate(engine.run(jobs, probes, Objective()), start=1):
            assert finished.key != "large" or n == 41, "the large one is the last"
            if n == 40:
                until = engine.record.batches
        return until, engine.record.fill_rate

    x0 = torch.zeros(model.latent_shape)
    few = [Job(i, x0, small()) for i in range(40)]
    alone, _ = batches_until_the_small_are_done(few)
    few = [Job(i, x0, small()) for i in range(40)]
    beside, fill_rate = batches_until_the_small_are_done([Job("large", x0, large()), *few])
    assert beside <= 2 * alone + 2
    # Many small requests of one image cannot fill batches once no other image is left.
    assert fill_rate >= (0.5 if kind == "many requests" else 0.95)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch, error, caplog):
    model = ToyModel()
    x0 = torch.randn(3, *model.latent_shape)
    expected = run(model, "enumerate", x0, 64)
    predict = model.predict

    def small(x_t, t, condition):
        if len(x_t) > 20:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")
        return predict(x_t, t, condition)

    monkeypatch.setattr(model, "predict", small)
    model.rows.clear()
    found = run(model, "enumerate", x0, 64)
    assert [m.split(";")[0] for m in caplog.messages] == [
        "out of memory with 64 rows",
        "out of memory with 32 rows",
    ]
    assert max(model.rows) == 16
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a.answer.losses, b.answer.losses)
        assert a.evaluations == b.evaluations


def test_out_of_memory_with_one_row_is_an_error():
    model = ToyModel()
    model.memory = 0
    with pytest.raises(torch.OutOfMemoryError):
        run(model, "enumerate", torch.randn(1, *model.latent_shape), 4)


def test_another_error_of_the_network_is_not_taken_for_memory(monkeypatch):
    model = ToyModel()

    def broken(x_t, t, condition):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(model, "predict", broken)
    message = "'predict' of toy failed with RuntimeError: shapes do not match"
    with pytest.raises(ModelError, match=message):
        run(model, "enumerate", torch.randn(1, *model.latent_shape), 4)


def test_gradients_are_those_of_autograd_whatever_the_batch():
    model = ToyModel()
    x0 = torch.randn(1, *model.latent_shape)
    probes = low_discrepancy_probes(11, 1000, model.latent_shape)
    v = torch.randn(3, model.vocabulary.dim)
    ids = torch.tensor([7, 0, 3, 3, 10])

    def search():
        reply = yield Gradients(v, ids)
        return Answer(0, torch.zeros(6), torch.zeros(6), {"reply": reply})

    leaf = v.clone().requires_grad_()
    t, noise = probes.timesteps[ids], probes.noise[ids]
    a, s = model.schedule.a[t], model.schedule.s[t]
    losses = []
    for row in leaf:
        x_t = a.view(-1, 1, 1, 1) * x0 + s.view(-1, 1, 1, 1) * noise
        eps = model.toy.predict(x_t, a, s, row.expand(len(ids), -1))
        losses.append((noise - eps).square().mean(dim=(1, 2, 3)))
    expected = torch.stack(losses)
    (gradient,) = torch.autograd.grad(expected.mean(dim=1).sum(), leaf)
    for batch_size in (1, 4, 100):
        engine = Engine(model, batch_size)
        (found,) = engine.run([Job(0, x0[0], search())], probes, Objective())
        reply = found.answer.trace["reply"]
        torch.testing.assert_close(reply.losses, expected.detach())
        torch.testing.assert_close(reply.gradients, gradient)
        assert found.evaluations == 2 * 3 * 5


def test_losses_come_back_per_condition_and_probe():
    model = ToyModel()
    x0 = torch.randn(2, *model.latent_shape)
    probes = low_discrepancy_probes(30, 1000, model.latent_shape)

    def search(conditions, ids):
        losses = yield Losses(conditions, ids)
        return Answer(0, torch.zeros(6), torch.zeros(6), {"losses": losses})

    jobs = [
        Job("whole", x0[0], search(model.vocabulary.table, torch.arange(30))),
        Job("part", x0[0], search(model.vocabulary.table[[4, 1]], torch.tensor([29, 2, 5]))),
    ]
    found = {
        f.key: f.answer.trace["losses"] for f in Engine(model, 13).run(jobs, probes, Objective())
    }
    torch.testing.assert_close(found["part"], found["whole"][[4, 1]][:, [29, 2, 5]])


def test_jobs_are_taken_only_as_batches_need_them():
    model = ToyModel()
    probes = low_discrepancy_probes(10, 1000, model.latent_shape)
    task = Task(model.vocabulary, probes)
    taken = []

    def jobs():
        for i in range(50):
            taken.append(i)
            yield Job(i, torch.randn(model.latent_shape), Enumerate().search(task))

    stream = Engine(model, 60).run(jobs(), probes, Objective())
    next(stream)
    assert len(taken) <= 2  # 60 rows an image


def test_a_strategy_may_answer_at_once_and_costs_nothing():
    model = ToyModel()

    def search():
        return Answer(2, torch.zeros(6), torch.zeros(6, dtype=torch.int64))
        yield

    probes = low_discrepancy_probes(4, 1000, model.latent_shape)
    (found,) = Engine(model).run([Job(0, torch.zeros(2, 3, 3), search())], probes, Objective())
    assert (found.answer.index, found.evaluations) == (2, 0)


def test_bad_input():
    model = ToyModel()
    with pytest.raises(DiveFastError, match="batch_size must be at least 1, got 0"):
        Engine(model, 0)
    wrong = low_discrepancy_probes(4, 1000, (1, 2, 2))
    with pytest.raises(DiveFastError, match=r"noise must have shape \[N, 2, 3, 3\]"):
        list(Engine(model).run([], wrong, Objective()))
    with pytest.raises(DiveFastError, match="expected a loss of l2, l1, huber, got 'l3'"):
        Objective("l3")

    def empty():
        yield Losses(model.vocabulary.table[:0], torch.arange(3))

    probes = low_discrepancy_probes(4, 1000, model.latent_shape)
    with pytest.raises(DiveFastError, match="needs conditions and probes, got 0 and 3"):
        list(Engine(model).run([Job(0, torch.zeros(2, 3, 3), empty())], probes, Objective()))
