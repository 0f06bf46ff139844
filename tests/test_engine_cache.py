"""Cache levels in the engine: "exact" changes nothing but the cost, "encoder" what it says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_transformer import make_dit
from toy_model import ToyModel

from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Answer, Gradients, Losses
from dive_fast.engine import Engine, EngineOptions, Job
from dive_fast.engine.objective import Objective
from dive_fast.errors import DiveFastError
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
    "enumerate": (Enumerate(), 12),
    "adaptive": (AdaptiveEnumerate(n_samples=(5, 20), to_keep=(3, 1)), None),
    "race": (Race(min_probes=5, round_probes=4), 20),
    "auto": (Auto(shortlist=2, gradient_probes=5), 20),
    "invert": (Invert(search_probes=10), 20),
    "dive-paper": (DivePaper(loops=3, batch_size=5, learning_rate=0.3), 20),
}
EXACT = EngineOptions(cache="exact")
ANSWER = Answer(0, torch.zeros(5), torch.zeros(5, dtype=torch.int64))
PARTS = ("predict", "prefix", "project", "encoder", "decoder")


@pytest.fixture
def dit():
    """A DiT that counts the rows that go through each of its parts."""
    model = make_dit()
    model.rows = Counter()
    for part in PARTS:
        setattr(model, part, _counted(getattr(model, part), part, model.rows))
    return model


def _counted(function, name, rows):
    def call(*arguments):
        first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
        rows[name] += len(first)
        return function(*arguments)

    return call


def latents(n: int, model) -> torch.Tensor:
    return torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(5))


def run(model, name, x0, batch_size, options):
    strategy, k = STRATEGIES[name]
    probes = strategy.probes(k, 1000, model.latent_shape, 0)
    task = Task(model.vocabulary, probes)
    engine = Engine(model, batch_size, options=options)
    jobs = [Job(i, x, strategy.search(task)) for i, x in enumerate(x0)]
    found = sorted(engine.run(jobs, probes, Objective()), key=lambda f: f.key)
    assert len(found) == len(x0)
    return found, engine.record


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.answer.index, a.evaluations) == (b.answer.index, b.evaluations)
        # The same rows in another batch, in two halves: fp32 sums in another order.
        torch.testing.assert_close(
            a.answer.losses, b.answer.losses, rtol=1e-4, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("name", STRATEGIES)
def test_exact_equals_uncached_together_and_alone_at_every_batch_size(dit, name):
    x0 = latents(5, dit)
    expected, record = run(dit, name, x0, 64, EngineOptions(cache="off"))
    assert record.cache_bytes == record.cache_hits == record.cache_misses == 0
    alone = [run(dit, name, x0[i : i + 1], 64, EXACT)[0][0] for i in range(len(x0))]
    assert_same(alone, expected)
    for batch_size in (1, 7, 64):
        found, record = run(dit, name, x0, batch_size, EXACT)
        assert_same(found, expected)
        assert record.cache_misses > 0 and record.cache_bytes > 0


@pytest.mark.parametrize("name", ["enumerate", "invert", "dive-paper"])
@pytest.mark.parametrize("entries", [0, 3, 11])
def test_a_small_bound_costs_time_but_no_answer(dit, name, entries):
    x0, row_bytes = latents(4, dit), 4 * (4 * 16 + 16)  # four tokens and temb, of width 16
    expected, _ = run(dit, name, x0, 16, EngineOptions(cache="off"))
    bound = entries * row_bytes + 10
    found, record = run(dit, name, x0, 16, EngineOptions(cache="exact", cache_bytes=bound))
    assert_same(found, expected)
    assert record.cache_bytes <= bound
    assert (record.cache_evictions > 0) == (entries > 0)


def test_a_prefix_is_computed_once_and_a_class_is_projected_once(dit):
    run(dit, "enumerate", latents(3, dit), 7, EXACT)
    assert dit.rows["prefix"] == 3 * 12
    assert dit.rows["project"] == 5
    assert dit.rows["encoder"] == dit.rows["decoder"] == 3 * 12 * 5
    assert dit.rows["predict"] == 0


def test_a_batch_shares_even_where_nothing_is_kept(dit):
    run(dit, "enumerate", latents(2, dit), 120, EngineOptions(cache="exact", cache_bytes=0))
    assert dit.rows["prefix"] == 2 * 12 and dit.rows["project"] == 5


def test_prefixes_serve_all_steps_of_a_search(dit):
    found, _ = run(dit, "dive-paper", latents(2, dit), 32, EXACT)
    steps_and_monitors = 2 * 3 * (20 + 20)
    assert dit.rows["encoder"] == steps_and_monitors
    assert dit.rows["prefix"] == 2 * 20


def test_off_runs_the_whole_network(dit):
    run(dit, "enumerate", latents(2, dit), 7, EngineOptions(cache="off"))
    assert set(dit.rows) == {"predict"}


def test_a_finished_image_is_dropped(dit):
    """Batches of one row serve one image at a time, and never need room for a second."""
    one_image = (12 * 80 + 5 * 16) * 4  # twelve prefixes and five projections
    options = EngineOptions(cache="exact", cache_bytes=one_image)
    _, record = run(dit, "enumerate", latents(6, dit), 1, options)
    assert record.cache_evictions == 0 and record.cache_bytes == one_image


def requests(model, *asked, options, batch_size=64, x0=None):
    """The replies to a fixed list of requests, and the engine's record."""

    def search():
        replies = []
        for request in asked:
            replies.append((yield request))
        return Answer(0, ANSWER.losses, ANSWER.n_probes, {"replies": replies})

    probes = low_discrepancy_probes(8, 1000, model.latent_shape)
    x0 = latents(1, model)[0] if x0 is None else x0
    engine = Engine(model, batch_size, options=options)
    (found,) = engine.run([Job(0, x0, search())], probes, Objective())
    return found.answer.trace["replies"], engine.record


def test_classes_and_relaxed_conditions_mix_in_a_batch(dit):
    table, ids = dit.vocabulary.table, torch.tensor([6, 1, 1])
    relaxed = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    probes = low_discrepancy_probes(8, 1000, dit.latent_shape)

    def search(request):
        reply = yield request
        return Answer(0, ANSWER.losses, ANSWER.n_probes, {"reply": reply})

    asked = [
        Losses(torch.tensor([4, 2]), ids),
        Losses(relaxed, ids),
        Losses(torch.tensor([2, 0, 4]), ids),
        Losses(table[[2]], ids),
    ]
    replies = {}
    for level in ("off", "exact"):
        x0 = latents(4, dit)
        jobs = [Job(i, x0[i], search(request)) for i, request in enumerate(asked)]
        engine = Engine(dit, 100, options=EngineOptions(cache=level))
        found = engine.run(jobs, probes, Objective())
        replies[level] = {f.key: f.answer.trace["reply"] for f in found}
    for i in range(4):
        torch.testing.assert_close(replies["exact"][i], replies["off"][i], rtol=1e-4, atol=1e-5)
    assert dit.rows["project"] == 3 + 2 + 1


def by_hand(model, encoded_for, condition, ids, x0):
    """Losses [k] and gradient [D] with the encoder's output of another condition, or its own."""
    probes = low_discrepancy_probes(8, 1000, model.latent_shape)
    t, noise = probes.timesteps[ids], probes.noise[ids]
    a, s = (f[t].view(-1, 1, 1, 1) for f in (model.schedule.a, model.schedule.s))
    leaf = condition[None].clone().requires_grad_()
    projected = model.project(leaf.expand(len(ids), -1))
    source = projected
    if encoded_for is not None:
        source = model.project(encoded_for.expand(len(ids), -1))
    encoded = model.encoder(model.prefix(a * x0 + s * noise, t), source)
    eps = model.decoder(encoded, projected)[:, : noise.shape[1]]
    losses = (noise - eps).square().mean(dim=(1, 2, 3))
    (gradient,) = torch.autograd.grad(losses.mean(), leaf)
    return losses.detach()[None], gradient


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_the_refresh_rule_and_the_truncated_backward(dit, refresh, batch_size):
    table, ids = dit.vocabulary.table, torch.tensor([5, 0, 3])
    x0 = latents(1, dit)[0]
    order = [3, 1, 0, 4, 2]
    options = EngineOptions(cache="encoder", refresh=refresh)
    asked = [Gradients(torch.tensor([c]), ids) for c in order]
    replies, record = requests(dit, *asked, options=options, batch_size=batch_size, x0=x0)
    refreshed = [step % refresh == 0 for step in range(5)]
    assert [reply.exact for reply in replies] == refreshed
    assert dit.rows["encoder"] == 3 * sum(refreshed)
    assert dit.rows["decoder"] == 3 * 5 and dit.rows["prefix"] == 3
    assert record.reused_rows == 3 * (5 - sum(refreshed))
    for step, (c, reply) in enumerate(zip(order, replies, strict=True)):
        source = None if refreshed[step] else table[order[step - step % refresh]]
        losses, gradient = by_hand(dit, source, table[c], ids, x0)
        torch.testing.assert_close(reply.losses, losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reply.gradients, gradient, rtol=1e-3, atol=1e-4)


def test_losses_are_exact_at_level_encoder(dit):
    table, ids = dit.vocabulary.table, torch.arange(6)
    asked = [
        Gradients(table[:1], ids),
        Losses(torch.arange(5), ids),
        Gradients(table[1:2], ids),
        Losses(torch.arange(5), ids),
    ]
    replies = {}
    for level in ("off", "encoder"):
        options = EngineOptions(cache=level, refresh=4)
        replies[level], _ = requests(dit, *asked, options=options, batch_size=9)
    assert [r.exact for r in replies["encoder"][::2]] == [True, False]
    for i in (1, 3):
        torch.testing.assert_close(replies["encoder"][i], replies["off"][i], rtol=1e-4, atol=1e-5)


def test_conditions_searched_at_once_do_not_share_their_encoders(dit):
    table, ids = dit.vocabulary.table, torch.tensor([2, 4])
    options = EngineOptions(cache="encoder", refresh=2)
    asked = [Gradients(table[[0, 3]], ids), Gradients(table[[1, 4]], ids)]
    x0 = latents(1, dit)[0]
    replies, _ = requests(dit, *asked, options=options, batch_size=3, x0=x0)
    for i in range(2):
        losses, gradient = by_hand(dit, table[3 * i], table[1 + 3 * i], ids, x0)
        torch.testing.assert_close(replies[1].losses[i : i + 1], losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(replies[1].gradients[i : i + 1], gradient, rtol=1e-3, atol=1e-4)


def test_a_probe_named_twice_and_half_fresh_requests(dit):
    table = dit.vocabulary.table
    options = EngineOptions(cache="encoder", refresh=2)
    asked = [
        Gradients(table[:1], torch.tensor([1, 1, 2])),
        Gradients(table[1:2], torch.tensor([7, 2])),
    ]
    x0 = latents(1, dit)[0]
    replies, record = requests(dit, *asked, options=options, x0=x0)
    assert [reply.exact for reply in replies] == [True, False] and record.reused_rows == 1
    fresh, _ = by_hand(dit, None, table[1], torch.tensor([7]), x0)
    stale, _ = by_hand(dit, table[0], table[1], torch.tensor([2]), x0)
    expected = torch.cat([fresh, stale], dim=1)
    torch.testing.assert_close(replies[1].losses, expected, rtol=1e-4, atol=1e-5)


def test_invert_races_on_exact_losses(dit):
    x0 = latents(8, dit)
    options = EngineOptions(cache="encoder", refresh=100)
    found, record = run(dit, "invert", x0, 64, options)
    assert record.reused_rows > 0
    probes = STRATEGIES["invert"][0].probes(20, 1000, dit.latent_shape, 0)
    for f, x in zip(found, x0, strict=True):
        measured = f.answer.n_probes > 0
        assert measured[f.answer.index]
        whole = all_losses(dit, x, probes)
        winner, n_probes = whole[f.answer.index], f.answer.n_probes
        for c in measured.nonzero()[:, 0].tolist():
            n = int(n_probes[c])
            gap = (whole[c, :n] - winner[:n]).mean()
            expected = winner[: int(n_probes[f.answer.index])].mean() + gap
            torch.testing.assert_close(f.answer.losses[c], expected, rtol=1e-4, atol=1e-5)
        stayed = n_probes == n_probes.max()
        assert int(f.answer.losses.where(stayed, torch.inf).argmin()) == f.answer.index


def all_losses(model, x0, probes):
    """Losses of all classes on all probes, uncached."""

    def search():
        losses = yield Losses(torch.arange(5), torch.arange(len(probes)))
        return Answer(0, ANSWER.losses, ANSWER.n_probes, {"losses": losses})

    engine = Engine(model, 64, options=EngineOptions(cache="off"))
    (found,) = engine.run([Job(0, x0, search())], probes, Objective())
    return found.answer.trace["losses"]


def test_the_answers_at_level_encoder_do_not_depend_on_the_batch(dit):
    x0, options = latents(6, dit), EngineOptions(cache="encoder", refresh=2)
    expected, _ = run(dit, "invert", x0, 64, options)
    for batch_size in (1, 13):
        found, _ = run(dit, "invert", x0, batch_size, options)
        assert_same(found, expected)


def test_out_of_memory_gives_up_the_cache_first(dit, monkeypatch, caplog):
    x0 = latents(2, dit)
    expected, _ = run(dit, "enumerate", x0, 64, EngineOptions(cache="off"))
    decoder, calls = dit.decoder, []

    def fails_once(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return decoder(*arguments)

    monkeypatch.setattr(dit, "decoder", fails_once)
    found, record = run(dit, "enumerate", x0, 64, EXACT)
    assert caplog.messages == ["out of memory with 56 rows; going on without the cache"]
    assert_same(found, expected)
    assert record.capacity_rows == 2 * 64


def test_auto_is_the_models_own_measured_level(dit):
    for level in ("off", "exact"):
        dit.default_cache, dit.rows["predict"] = level, 0
        run(dit, "enumerate", latents(1, dit), 64, None)
        assert (dit.rows["predict"] > 0) == (level == "off")


def test_bad_options(dit):
    with pytest.raises(DiveFastError, match="cache of auto, off, exact, encoder, got 'all'"):
        EngineOptions(cache="all")
    with pytest.raises(DiveFastError, match="cache_bytes must be at least 0, got -1"):
        EngineOptions(cache_bytes=-1)
    with pytest.raises(DiveFastError, match="refresh must be at least 1, got 0"):
        EngineOptions(refresh=0)
    with pytest.raises(DiveFastError, match="autocast of bfloat16 or None, got 'float16'"):
        EngineOptions(autocast="float16")
    toy = ToyModel()
    with pytest.raises(DiveFastError, match="'off' for toy, which does not come in parts, got 'ex"):
        run(toy, "enumerate", torch.randn(1, *toy.latent_shape), 8, EXACT)
    with pytest.raises(DiveFastError, match="'network' for channels_last, got toy"):
        run(toy, "enumerate", torch.randn(1, 2, 3, 3), 8, EngineOptions(channels_last=True))
