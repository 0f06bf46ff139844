"""A gradient for every few probes of a request: by autograd, however batches cut them."""

from __future__ import annotations

import pytest
import torch
from tiny_transformer import make_dit
from toy_model import ToyModel

from dive_fast import DiveFastError
from dive_fast.core.probes import ProbeList, low_discrepancy_probes
from dive_fast.core.requests import Answer, Gradients, Losses, LossesAndGradients
from dive_fast.engine import Engine, EngineOptions, Job
from dive_fast.engine.objective import Objective
from dive_fast.strategies.averaged import averaged


def asks(request):
    reply = yield request
    return Answer(0, torch.zeros(1), torch.zeros(1, dtype=torch.int64), {"reply": reply})


def answered(model, x0, searches, probes, batch_size=64, cache="off") -> list[LossesAndGradients]:
    engine = Engine(model, batch_size, options=EngineOptions(cache=cache))
    jobs = [Job(i, x, search) for i, (x, search) in enumerate(zip(x0, searches, strict=True))]
    found = sorted(engine.run(jobs, probes, Objective()), key=lambda f: f.key)
    assert engine.record.evaluations == sum(f.evaluations for f in found)
    return [f.answer.trace["reply"] for f in found]


def by_autograd(model, x0: torch.Tensor, v: torch.Tensor, probes: ProbeList, ids: list[int]):
    """Losses [n, k], and the gradient of each loss [n, k, D], one row at a time."""
    a, s = model.schedule.a, model.schedule.s
    losses, gradients = torch.empty(len(v), len(ids)), torch.empty(len(v), len(ids), v.shape[1])
    for i, row in enumerate(v):
        for j, k in enumerate(ids):
            t, eps = probes.timesteps[k], probes.noise[probes.noise_index[k]]
            at = row.clone().requires_grad_()
            x_t = a[t] * x0 + s[t] * eps
            # A DiT says a variance too, in the channels behind.
            out = model.predict(x_t[None], t[None], at[None])[0, : len(x0)]
            loss = (eps - out).square().mean()
            losses[i, j] = loss.detach()
            gradients[i, j] = torch.autograd.grad(loss, at)[0]
    return losses, gradients


def grouped(gradients: torch.Tensor, per: int) -> torch.Tensor:
    """[ceil(k / per), n, D], means of [n, k, D] over every ``per`` probes."""
    return torch.stack([part.mean(dim=1) for part in gradients.split(per, dim=1)])


@pytest.fixture(scope="module", params=["toy", "off", "exact"])
def model_and_cache(request):
    if request.param == "toy":
        return ToyModel(), "off"
    return make_dit(), request.param


@pytest.mark.parametrize("per", [1, 2, 3, 7, 9])
def test_against_autograd_however_batches_cut_the_groups(model_and_cache, per):
    model, cache = model_and_cache
    probes = low_discrepancy_probes(9, 1000, model.latent_shape)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(2, *model.latent_shape, generator=generator)
    table = model.vocabulary.rows(torch.arange(4)).detach().float()
    # Odd numbers of probes, in another order than the list's, of several conditions at once.
    asked = [(table[:3] + 0.1, [6, 0, 3, 1, 2, 8, 4]), (table[3:] - 0.2, [5, 7, 0])]
    expected = [
        by_autograd(model, x, one[0], probes, one[1]) for x, one in zip(x0, asked, strict=True)
    ]
    for batch_size in (1, 2, 5, 64):
        requests = [Gradients(v, torch.tensor(ids), per=per) for v, ids in asked]
        found = answered(model, x0, map(asks, requests), probes, batch_size, cache)
        for reply, (losses, gradients) in zip(found, expected, strict=True):
            means = grouped(gradients, per)
            assert reply.gradients.shape == means.shape and reply.exact
            torch.testing.assert_close(reply.losses, losses, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(reply.gradients, means, rtol=1e-3, atol=1e-5)


def test_classes_by_index_have_gradients_by_group_too():
    model = ToyModel()
    probes = low_discrepancy_probes(5, 1000, model.latent_shape)
    x0 = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(2))
    chosen = torch.tensor([4, 1])
    (reply,) = answered(model, x0, [asks(Gradients(chosen, torch.arange(5), per=2))], probes)
    _, gradients = by_autograd(model, x0[0], model.toy.table[chosen], probes, list(range(5)))
    torch.testing.assert_close(reply.gradients, grouped(gradients, 2), rtol=1e-3, atol=1e-6)


def test_the_mean_of_the_groups_is_the_gradient_without_them():
    model = make_dit()
    probes = low_discrepancy_probes(8, 1000, model.latent_shape)
    x0 = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(4))
    v0 = model.vocabulary.mean()[None]
    requests = [Gradients(v0, torch.arange(8), per=per) for per in (2, None)]
    parts, whole = answered(model, x0[:1].expand(2, -1, -1, -1), map(asks, requests), probes)
    assert parts.gradients.shape == (4, *whole.gradients.shape)
    torch.testing.assert_close(parts.gradients.mean(dim=0), whole.gradients, rtol=1e-3, atol=1e-6)
    assert torch.allclose(parts.losses, whole.losses, rtol=1e-4)


def test_answers_of_several_prompts_own_their_parts_of_the_gradient():
    """Of a row [a, b] the loss is (l(a) + l(b)) / 2, the gradient [g(a), g(b)] / 2."""
    model = ToyModel()
    probes = low_discrepancy_probes(5, 1000, model.latent_shape)
    x0 = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    rows = model.toy.table[:6].reshape(2, -1) + 0.05  # two answers of three prompts
    for batch_size in (1, 4, 64):
        search = averaged(asks(Gradients(rows, torch.arange(5), per=2)), 3)
        (reply,) = answered(model, x0, [search], probes, batch_size)
        prompts = rows.reshape(6, -1)
        losses, gradients = by_autograd(model, x0[0], prompts, probes, list(range(5)))
        assert reply.gradients.shape == (3, 2, rows.shape[1])
        torch.testing.assert_close(
            reply.losses, losses.view(2, 3, 5).mean(dim=1), rtol=1e-4, atol=0
        )
        expected = grouped(gradients, 2).view(3, 2, -1) / 3
        torch.testing.assert_close(reply.gradients, expected, rtol=1e-3, atol=1e-6)


def test_other_requests_may_share_the_run():
    model = ToyModel()
    probes = low_discrepancy_probes(6, 1000, model.latent_shape)
    x0 = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    v, ids = model.toy.table[:2] + 0.1, torch.arange(6)
    requests = [Gradients(v, ids, per=4), Losses(v, ids), Gradients(v, ids)]
    together = answered(model, x0, map(asks, requests), probes, 7)
    _, gradients = by_autograd(model, x0[0], v, probes, list(range(6)))
    torch.testing.assert_close(together[0].gradients, grouped(gradients, 4), rtol=1e-3, atol=1e-6)
    losses, _ = by_autograd(model, x0[1], v, probes, list(range(6)))
    torch.testing.assert_close(together[1], losses, rtol=1e-4, atol=0)
    _, gradients = by_autograd(model, x0[2], v, probes, list(range(6)))
    torch.testing.assert_close(together[2].gradients, gradients.mean(dim=1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("per", [0, -2])
def test_bad_groups(per):
    model = ToyModel()
    probes = low_discrepancy_probes(6, 1000, model.latent_shape)
    search = asks(Gradients(model.vocabulary.mean()[None], torch.arange(6), per=per))
    with pytest.raises(DiveFastError, match=f"a gradient needs at least 1 probe, got per={per}."):
        answered(model, torch.zeros(1, *model.latent_shape), [search], probes)
