"""Noises in pairs eps, -eps: what they cancel, and who keeps the pairs together."""

from __future__ import annotations

import pytest
import torch
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError
from dive_fast.core.probes import ProbeList, low_discrepancy_probes, published_probes
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.strategies import Auto, DivePaper, Enumerate, Race, resolve_strategy

SHAPE = (2, 3, 3)


@pytest.mark.parametrize("k", [1, 2, 5, 8, 101])
def test_the_noises_of_a_pair_cancel_each_other(k):
    probes = low_discrepancy_probes(k, 1000, SHAPE, seed=4)
    assert probes.unit == 2 and len(probes) == k
    noise = probes.noise[probes.noise_index]
    whole = k // 2 * 2
    assert torch.equal(noise[0:whole:2], -noise[1:whole:2])
    # One draw a pair, standard normal, and the first is the generator's first.
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    assert torch.equal(noise[0], first)
    firsts = noise[::2].flatten(1)
    assert len(torch.unique(firsts, dim=0)) == -(-k // 2)


def test_a_shorter_list_is_a_prefix():
    long = low_discrepancy_probes(41, 1000, SHAPE, seed=1)
    for k in (1, 2, 7, 40):
        short = low_discrepancy_probes(k, 1000, SHAPE, seed=1)
        assert torch.equal(short.timesteps, long.timesteps[:k])
        assert torch.equal(short.noise, long.noise[:k])


def test_without_pairs_every_probe_has_a_noise_of_its_own():
    plain = low_discrepancy_probes(7, 1000, SHAPE, seed=3, antithetic=False)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(7)])
    assert plain.unit == 1 and torch.equal(plain.noise, drawn)
    pairs = low_discrepancy_probes(7, 1000, SHAPE, seed=3)
    assert torch.equal(pairs.timesteps, plain.timesteps)
    assert torch.equal(pairs.noise[::2], drawn[:4])


def test_what_is_odd_in_the_noise_cancels_within_a_pair():
    """On the toy d_k = l_c - l_b is linear in eps: at one t its pairs do not vary at all."""
    model = ToyModel(n_classes=2)
    x0, _ = model.toy.sample(1, torch.Generator().manual_seed(0))
    eps = torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(1))
    noise = torch.stack([eps, -eps], dim=1).flatten(0, 1)
    probes = ProbeList(torch.full((400,), 300), noise, unit=2)
    losses = DiffusionClassifier(model).losses(latents=x0, probes=probes)[0]
    difference = (losses[1] - losses[0]).double()
    pairs = difference.view(200, 2).mean(dim=1)
    assert pairs.std() < 1e-4 * difference.std()


def test_learned_timesteps_keep_the_pairs():
    weights = TimestepWeights(1000, (3.0, 1.0), (1 / 3, 1.0))
    learned = weights.probes(9, SHAPE, seed=2)
    uniform = low_discrepancy_probes(9, 1000, SHAPE, seed=2)
    assert learned.unit == 2 and torch.equal(learned.noise, uniform.noise)


def test_published_lists_are_not_touched():
    probes = published_probes(10, 1000, SHAPE)
    noise = torch.randn(1024, *SHAPE, generator=torch.Generator().manual_seed(42))
    assert probes.unit == 1 and torch.equal(probes.noise, noise[:10])
    assert probes.timesteps.tolist() == list(range(50, 1000, 100))
    for preset in ("dive-paper", "diffusion-classifier"):
        chosen = resolve_strategy(None, preset, {})
        assert chosen.probes(None, 1000, SHAPE, 0).unit == 1


def test_a_run_says_which_noises_it_had():
    classifier = DiffusionClassifier(ToyModel())
    for strategy in (Auto(), Race(), Enumerate()):
        assert classifier.identity(strategy=strategy)["noise"] == "antithetic pairs"
    assert "noise" not in classifier.identity(strategy=DivePaper())
    single = low_discrepancy_probes(6, 1000, SHAPE, antithetic=False)
    assert "noise" not in classifier.identity(strategy=Enumerate(), probes=single)


@pytest.mark.parametrize("unit", [0, -1, 1.5, "2"])
def test_bad_units(unit):
    with pytest.raises(DiveFastError, match="unit must be"):
        ProbeList(torch.arange(4), torch.zeros(4, *SHAPE), unit=unit)
