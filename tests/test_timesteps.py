"""Learned timesteps: the list they make, how they are learned, stored and used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny import read_json, write_json, write_model
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, ModelError, ProbeList
from dive_fast.core.probes import low_discrepancy_probes, van_der_corput
from dive_fast.core.requests import Answer, Gradients
from dive_fast.core.timesteps import BINS, TimestepWeights, estimate
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.strategies import DivePaper, Enumerate

SHAPE = (1, 2, 2)
UNIFORM = TimestepWeights(1000, (1.0,) * BINS, (1.0,) * BINS)
# All probes in the second and the last quarter, three to one.
LOPSIDED = TimestepWeights(1000, (0, 3, 0, 1), (1, 2, 3, 4))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestList:
    @pytest.mark.parametrize("n_timesteps", [1000, 50, 37])
    @pytest.mark.parametrize("bins", [1, 3, 20])
    def test_uniform_is_the_low_discrepancy_list(self, n_timesteps: int, bins: int) -> None:
        weights = TimestepWeights(n_timesteps, (2.0,) * bins, (5.0,) * bins)
        found = weights.probes(300, SHAPE, seed=4)
        expected = low_discrepancy_probes(300, n_timesteps, SHAPE, seed=4)
        assert torch.equal(found.timesteps, expected.timesteps)
        assert torch.equal(found.noise, expected.noise)
        assert torch.equal(found.weights, torch.ones(300))

    def test_the_sequence_mirrors_binary_digits(self) -> None:
        mirrored = [int(f"{i:b}"[::-1], 2) / 2 ** i.bit_length() for i in range(1, 10_001)]
        assert van_der_corput(10_000) == mirrored
        assert van_der_corput(10) == mirrored[:10] and van_der_corput(1) == [0.5]

    def test_a_prefix_of_a_longer_list(self) -> None:
        long, short = LOPSIDED.probes(63, SHAPE, seed=2), LOPSIDED.probes(10, SHAPE, seed=2)
        for name in ("timesteps", "noise", "weights", "noise_index"):
            assert torch.equal(getattr(long, name)[:10], getattr(short, name))

    def test_every_prefix_follows_the_density(self) -> None:
        timesteps = LOPSIDED.probes(256, SHAPE).timesteps
        bins = timesteps // 250
        assert set(bins.tolist()) == {1, 3}
        for k in range(1, 257):
            # Van der Corput: at most about log2(k) / 3 + 1 points off.
            assert abs((bins[:k] == 1).sum().item() - 0.75 * k) <= 3
        # Within a bin the timesteps are spread evenly.
        inside = timesteps[bins == 1].double()
        assert inside.mean().item() == pytest.approx(374.5, abs=3)
        assert inside.unique().numel() == len(inside)

    def test_weights_have_mean_1_under_the_density(self) -> None:
        probes = LOPSIDED.probes(256, SHAPE)
        assert probes.weights.unique().tolist() == pytest.approx([0.8, 1.6])
        assert probes.weights.mean().item() == pytest.approx(1, abs=0.01)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, (1,), (1,)), "n_timesteps must be a whole number of at least 1, got 0"),
            ((True, (1,), (1,)), "n_timesteps must be"),
            ((10, (), ()), "one number per bin, got 0 and 0"),
            ((10, (1, 1), (1,)), "one number per bin, got 2 and 1"),
            ((10, (-1.0, 1), (1, 1)), "density must be a list of finite numbers of at least 0"),
            ((10, (float("nan"),), (1,)), "density must be"),
            ((10, (1,), (float("inf"),)), "weights must be"),
            ((10, (1,), ("1",)), "weights must be"),
            ((10, 1, (1,)), "density must be a list"),
            ((10, (1, 0), (0, 1)), "above 0 together in some bin"),
            ((10, (0, 0), (1, 1)), "above 0 together in some bin"),
        ],
    )
    def test_bad_input(self, arguments: tuple, message: str) -> None:
        with pytest.raises(DiveFastError, match=message):
            TimestepWeights(*arguments)

    def test_bad_count(self) -> None:
        with pytest.raises(DiveFastError, match="number of probes must be at least 1, got 0"):
            UNIFORM.probes(0, SHAPE)

    @pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [0.0, 0.0]])
    def test_bad_weights_of_a_probe_list(self, weights: list[float]) -> None:
        with pytest.raises(DiveFastError, match="weights must"):
            ProbeList(torch.arange(2), torch.zeros(2, *SHAPE), weights=torch.tensor(weights))


class TestStored:
    def test_round_trip(self) -> None:
        for weights in (UNIFORM, LOPSIDED, TimestepWeights(10, (0.1 + 0.2, 1e-9), (1 / 3, 7.0))):
            assert TimestepWeights.from_dict(json.loads(json.dumps(weights.to_dict()))) == weights

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"density": None}, "density must be a list"),
            ({"density": [1.0]}, "one number per bin"),
            ({"n_timesteps": 1000.0}, "whole number"),
            ({"more": 1}, "must hold exactly n_timesteps, density, weights, got .*more"),
        ],
    )
    def test_damaged(self, change: dict, message: str, tmp_path: Path) -> None:
        with pytest.raises(DiveFastError, match=message):
            TimestepWeights.from_dict(UNIFORM.to_dict() | change)
        model = write_model(tmp_path / "model")
        write_json(model / "dive_fast.json", {"timesteps": UNIFORM.to_dict() | change})
        with pytest.raises(ModelError, match=f"timesteps in .*dive_fast.json cannot.*{message}"):
            DiffusionClassifier.from_pretrained(model)

    @pytest.mark.parametrize("values", [None, [1], {}, "uniform"])
    def test_no_timesteps_at_all(self, values: object) -> None:
        with pytest.raises(DiveFastError, match="must hold exactly"):
            TimestepWeights.from_dict(values)

    def test_beside_the_model(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "model")
        write_json(model / "dive_fast.json", {"command": "made so"})
        clf = DiffusionClassifier.from_pretrained(model)
        assert clf.model.timesteps is None
        clf.model.timesteps = LOPSIDED
        clf.save_fitted()
        content = read_json(model / "dive_fast.json")
        assert content["command"] == "made so" and content["timesteps"] == LOPSIDED.to_dict()
        assert DiffusionClassifier.from_pretrained(model).model.timesteps == LOPSIDED
        clf.model.timesteps = None
        clf.save_fitted()
        assert set(read_json(model / "dive_fast.json")) == {"command", "beta"}

    def test_of_another_schedule(self, tmp_path: Path) -> None:
        clf = DiffusionClassifier(ToyModel())
        clf.model.timesteps = TimestepWeights(50, (1.0,), (1.0,))
        clf.save_fitted(tmp_path)
        x0 = torch.zeros(1, 2, 3, 3)
        message = "toy has 1000 timesteps, but these were learned for 50"
        with pytest.raises(ModelError, match=message):
            clf(latents=x0)
        with pytest.raises(ModelError, match=message):
            DiffusionClassifier(ToyModel()).load_fitted(tmp_path)


class TestLosses:
    def test_weights_multiply_losses_and_gradients(self) -> None:
        model = ToyModel()
        x0, _ = model.toy.sample(1, generator())
        plain = low_discrepancy_probes(7, 1000, model.latent_shape)
        weights = torch.rand(7, generator=generator(1)) * 3
        v = torch.randn(3, model.vocabulary.dim, generator=generator(2))

        def ask():
            reply = yield Gradients(v, torch.arange(7))
            single = []
            for k in range(7):
                single.append((yield Gradients(v, torch.tensor([k]))).gradients)
            found = {"losses": reply.losses, "all": reply.gradients, "each": torch.stack(single)}
            return Answer(0, v.new_zeros(6), torch.ones(6), found)

        def measured(probes: ProbeList) -> dict:
            (done,) = Engine(model).run([Job(0, x0[0], ask())], probes, Objective())
            return done.answer.trace

        one = measured(plain)
        weighted = measured(dataclasses.replace(plain, weights=weights))
        torch.testing.assert_close(weighted["losses"], one["losses"] * weights)
        expected = (one["each"] * weights[:, None, None]).mean(dim=0)
        torch.testing.assert_close(weighted["all"], expected)

    def test_the_expected_loss_stays(self) -> None:
        """Importance sampling: fewer probes where weights are high, the same mean."""
        model = ToyModel()
        clf = DiffusionClassifier(model)
        x0, _ = model.toy.sample(2, generator(5))
        density = tuple(torch.linspace(3, 0.2, BINS).tolist())
        learned = TimestepWeights(1000, density, tuple(1 / q for q in density))
        shape = model.latent_shape
        found = clf.losses(latents=x0, probes=learned.probes(4000, shape)).mean(dim=2)
        a, s = model.schedule.a, model.schedule.s
        expected = model.toy.expected_loss(x0, torch.arange(6), a, s).mean(dim=2)
        torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0)


class TestEstimate:
    def test_density_follows_the_spread_of_the_differences(self) -> None:
        timesteps = low_discrepancy_probes(400, 1000, SHAPE).timesteps
        # Rivals are worse by 1, give or take 3 in the middle half of the timesteps, else 1.
        sigma = torch.where((timesteps >= 250) & (timesteps < 750), 3.0, 1.0)
        right = torch.randn(50, 1, 400, generator=generator())
        rivals = right + 1 + sigma * torch.randn(50, 2, 400, generator=generator(1))
        learned = estimate(torch.cat([right, rivals], dim=1), timesteps, 1000)
        assert learned.n_timesteps == 1000 and len(learned.density) == BINS
        assert sum(learned.density) / BINS == pytest.approx(1, abs=1e-4)
        density = torch.tensor(learned.density)
        # sigma / mean(sigma) = 1.5 and 0.5, of which a tenth is uniform; bins at the border mix.
        expected = {1.45: [*range(6, 14)], 0.55: [*range(4), *range(16, 20)]}
        for value, bins in expected.items():
            torch.testing.assert_close(density[bins], torch.full((8,), value), atol=0.05, rtol=0)
        product = [q * w for q, w in zip(learned.density, learned.weights, strict=True)]
        assert product == pytest.approx([1.0] * BINS, abs=1e-4)

    def test_no_weight_is_beyond_measure(self) -> None:
        timesteps = torch.arange(40) * 25
        losses = torch.zeros(1, 2, 40)
        losses[0, 1, :2] = torch.tensor([1.0, 2.0])
        assert max(estimate(losses, timesteps, 1000).weights) <= 10

    @pytest.mark.parametrize(
        ("losses", "timesteps", "message"),
        [
            (torch.zeros(3, 40), torch.arange(40), r"losses \[N, 1 \+ R, K\]"),
            (torch.zeros(0, 2, 40), torch.arange(40) * 25, "at least one image"),
            (torch.zeros(3, 1, 40), torch.arange(40) * 25, "one rival"),
            (torch.full((1, 2, 40), torch.nan), torch.arange(40) * 25, "finite losses"),
            (torch.rand(1, 2, 30), torch.arange(40) * 25, "20 bins of the timesteps .*, got 30"),
            (torch.rand(1, 2, 40), torch.arange(40), "at least 2 probes in each of 20 bins"),
            (torch.ones(1, 2, 40), torch.arange(40) * 25, "do not differ at any timestep"),
        ],
    )
    def test_bad_input(self, losses: torch.Tensor, timesteps, message: str) -> None:
        with pytest.raises(DiveFastError, match=message):
            estimate(losses, timesteps, 1000)


class TestClassifier:
    @pytest.fixture
    def toy_and_30_images(self) -> tuple[DiffusionClassifier, torch.Tensor, torch.Tensor]:
        model = ToyModel(spread=0.4)
        return DiffusionClassifier(model), *model.toy.sample(30, generator(3))

    def test_fewer_probes_for_the_same_answers(self, toy_and_30_images: tuple) -> None:
        """The mean over t, estimated on 8 probes, lies closer to its limit."""
        clf, x0, labels = toy_and_30_images
        learned = clf.fit_timesteps(latents=x0, labels=labels)
        assert clf.model.timesteps is learned
        a, s = clf.model.schedule.a, clf.model.schedule.s
        x0, _ = clf.model.toy.sample(40, generator(9))
        limit = clf.model.toy.expected_loss(x0, torch.arange(6), a, s).mean(dim=2)
        limit = limit - limit.mean(dim=1, keepdim=True)

        def error(weights: TimestepWeights) -> float:
            found = []
            for seed in range(10):
                probes = weights.probes(8, clf.model.latent_shape, seed)
                losses = clf.losses(latents=x0, probes=probes).mean(dim=2).double()
                found.append((losses - losses.mean(dim=1, keepdim=True) - limit).square().mean())
            return torch.stack(found).mean().item()

        assert error(learned) < 0.9 * error(UNIFORM)

    def test_determinism(self, toy_and_30_images: tuple) -> None:
        clf, x0, labels = toy_and_30_images
        first = clf.fit_timesteps(latents=x0, labels=labels, probes=60)
        clf.batch_size = 7
        again = clf.fit_timesteps(latents=x0, labels=labels, probes=60)
        assert again.density == pytest.approx(first.density, rel=1e-3)
        generated = clf.fit_timesteps(generate=8, probes=60)
        assert generated == clf.fit_timesteps(generate=8, probes=60)
        assert generated.density == pytest.approx(first.density, rel=0.5)
        assert clf.fit_timesteps(generate=8, probes=60, seed=1) != generated

    def test_what_it_costs(self, toy_and_30_images: tuple) -> None:
        """Five rivals on 20 probes, then the right class and two of them on all."""
        clf, x0, labels = toy_and_30_images
        clf.fit_timesteps(latents=x0, labels=labels, probes=60, rivals=2)
        assert sum(clf.model.rows) == 30 * (5 * 20 + 3 * 60)
        clf.model.rows.clear()
        clf.fit_timesteps(latents=x0, labels=labels, probes=60, rivals=9)
        assert sum(clf.model.rows) == 30 * 6 * 60

    def test_without_labels_the_lowest_loss_on_20_probes_is_taken_for_right(
        self, toy_and_30_images: tuple
    ) -> None:
        clf, x0, _ = toy_and_30_images
        found = clf.fit_timesteps(latents=x0, probes=60, rivals=2, seed=3)
        assert sum(clf.model.rows) == 30 * (6 * 20 + 3 * 60)
        lowest = clf.losses(latents=x0, probes=60, seed=3)[:, :, :20].mean(dim=2).argmin(dim=1)
        expected = clf.fit_timesteps(latents=x0, labels=lowest, probes=60, rivals=2, seed=3)
        assert found == expected and clf.model.timesteps == expected

    @pytest.mark.parametrize("strategy", ["enumerate", "race", "invert"])
    def test_every_strategy_follows_them(self, toy_and_30_images: tuple, strategy: str) -> None:
        clf, x0, _ = toy_and_30_images
        x0 = x0[:3]
        before = clf(latents=x0, strategy=strategy, probes=40)
        clf.model.timesteps = LOPSIDED
        given = LOPSIDED.probes(40, clf.model.latent_shape)
        by_hand = clf(latents=x0, strategy=strategy, probes=given)
        for settings in ({}, {"timesteps": "learned"}, {"timesteps": LOPSIDED}):
            found = clf(latents=x0, strategy=strategy, probes=40, **settings)
            for a, b in zip(found, by_hand, strict=True):
                assert torch.equal(a.losses.nan_to_num(), b.losses.nan_to_num())
        for settings in ({"timesteps": "uniform"}, {"timesteps": UNIFORM}):
            found = clf(latents=x0, strategy=strategy, probes=40, **settings)
            for a, b in zip(found, before, strict=True):
                assert torch.equal(a.losses.nan_to_num(), b.losses.nan_to_num())

    def test_the_number_of_probes_stays_the_default(self, toy_and_30_images: tuple) -> None:
        clf, _, _ = toy_and_30_images
        clf.model.timesteps = LOPSIDED
        assert len(clf.probe_list(Enumerate())) == 100
        assert clf.probe_list(Enumerate()).weights is not None
        assert clf.probe_list(Enumerate(), timesteps="uniform").weights is None

    def test_presets_are_uniform(self, toy_and_30_images: tuple) -> None:
        clf, x0, _ = toy_and_30_images
        expected = clf.probe_list(DivePaper())
        clf.model.timesteps = LOPSIDED
        found = clf.probe_list(DivePaper())
        assert torch.equal(found.timesteps, expected.timesteps) and found.weights is None
        for preset in ("dive-paper", "diffusion-classifier"):
            with pytest.raises(DiveFastError, match="given or published"):
                clf(latents=x0[:1], preset=preset, timesteps="learned")

    def test_bad_input(self, toy_and_30_images: tuple) -> None:
        clf, x0, labels = toy_and_30_images
        data = {"latents": x0, "labels": labels}
        for arguments, message in [
            ({}, "either images or latents"),
            ({"latents": x0, "labels": labels[:2]}, r"shape \[30\]"),
            ({**data, "generate": 3}, "images with labels, or generate, got both"),
            ({"labels": labels, "generate": 3}, "got both"),
            ({"generate": 0}, "generate must be at least 1, got 0"),
            ({**data, "rivals": 0}, "rivals must be at least 1, got 0"),
            ({**data, "probes": 0}, "at least 1, got 0"),
            ({**data, "probes": 10}, "at least 2 probes in each of 20 bins"),
        ]:
            with pytest.raises(DiveFastError, match=message):
                clf.fit_timesteps(**arguments)
        with pytest.raises(DiveFastError, match="toy has one class"):
            DiffusionClassifier(ToyModel(n_classes=1)).fit_timesteps(generate=2)
        with pytest.raises(ModelError, match="toy has no learned timesteps; see fit_timesteps"):
            clf(latents=x0, timesteps="learned")
        for timesteps in ("best", 3, LOPSIDED.to_dict()):
            with pytest.raises(DiveFastError, match="'learned', 'uniform' or a TimestepWeights"):
                clf(latents=x0, timesteps=timesteps)
        given = low_discrepancy_probes(5, 1000, clf.model.latent_shape)
        with pytest.raises(DiveFastError, match="given or published"):
            clf(latents=x0, probes=given, timesteps=LOPSIDED)
