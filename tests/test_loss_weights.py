"""Learned weights of a classifier: what they do to probes, answers, beta and shortlists."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, LossWeights, ModelError, TimestepWeights
from dive_fast.core.loss_weights import digest_of
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.predict.fitting_weights import evaluations_per_image
from dive_fast.predict.predictor import Predictor
from dive_fast.strategies import Auto, DivePaper, Enumerate

HALVES = LossWeights(1000, (1.5, 0.5), 20.0)
LOPSIDED = TimestepWeights(1000, (0, 3, 0, 1), (1, 2, 3, 4))
SHAPE = (2, 3, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Misled(ToyModel):
    """From timestep 300 on its prediction errs, by what is another for each class and place."""

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        found = super().predict(x_t, t, condition)
        where = torch.sin(40 * x_t + 70 * condition.view(x_t.shape))
        return found + 2.0 * (t >= 300).view(-1, 1, 1, 1) * where


@pytest.fixture(scope="module")
def misled() -> DiffusionClassifier:
    return DiffusionClassifier(Misled(spread=0.3))


@pytest.fixture
def toy() -> tuple[DiffusionClassifier, torch.Tensor, torch.Tensor]:
    model = ToyModel(spread=0.4)
    return DiffusionClassifier(model), *model.toy.sample(12, generator(3))


class TestPlaced:
    def test_the_weighted_mean_is_what_is_estimated(self) -> None:
        """Sum over bins of q' v' is the sum of q v w, up to its scale."""
        w = LossWeights(1000, (2.4, 0.3, 0.9, 0.4), 1.0)
        q, v = (1.0, 3.0, 2.0, 0.5), (1.0, 1 / 3, 0.5, 2.0)
        placed = w.placed(TimestepWeights(1000, q, v))
        products = [a * b for a, b in zip(placed.density, placed.weights, strict=True)]
        expected = [a * b * c for a, b, c in zip(q, v, w.weights, strict=True)]
        assert [x / sum(products) for x in products] == pytest.approx(
            [x / sum(expected) for x in expected]
        )

    def test_probes_follow_the_weights_and_count_nearly_alike(self) -> None:
        w = LossWeights(1000, (3.7, 0.1, 0.1, 0.1), 1.0)
        probes = w.placed(None).probes(1000, (1, 1, 1))
        share = (probes.timesteps < 250).double().mean().item()
        # 0.9 of them as the weights say, a tenth evenly.
        assert share == pytest.approx(0.9 * 3.7 / 4 + 0.1 / 4, abs=0.01)
        assert float(probes.weights.max()) < 1.2
        value = torch.rand(1000, generator=generator(), dtype=torch.float64)
        exact = (value * torch.tensor(w.weights).repeat_interleave(250)).mean()
        found = (value[probes.timesteps] * probes.weights).mean()
        assert found.item() == pytest.approx(exact.item(), abs=0.04)

    def test_not_followed_they_only_multiply(self) -> None:
        placed = HALVES.placed(LOPSIDED, follow=False)
        assert placed.density == LOPSIDED.density
        assert placed.weights == (1.5, 3.0, 1.5, 2.0)
        even = HALVES.placed(None, follow=False)
        assert even.density == (1.0, 1.0) and even.weights == HALVES.weights

    def test_bins_of_two_kinds(self) -> None:
        w = LossWeights(1000, (0.5, 1.0, 1.5), 1.0)
        placed = w.placed(TimestepWeights(1000, (1.0, 2.0), (1.0, 0.5)), follow=False)
        assert placed.density == (1, 1, 1, 2, 2, 2)
        assert placed.weights == pytest.approx((0.5, 0.5, 1, 0.5, 0.75, 0.75))

    def test_of_another_schedule(self) -> None:
        with pytest.raises(DiveFastError, match="timesteps of 1000, got such of 50"):
            HALVES.placed(TimestepWeights(50, (1.0,), (1.0,)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n_timesteps": 0}, "n_timesteps must be a whole number of at least 1, got 0"),
            ({"n_timesteps": 10.0}, "n_timesteps must be"),
            ({"weights": ()}, "weights must be a list of numbers from 1e-12 to 1e12"),
            ({"weights": 1.0}, "weights must be a list"),
            ({"weights": (2.0, 0.0)}, "weights must be a list"),
            ({"weights": (math.nan, 1.0)}, "weights must be a list"),
            ({"weights": (True, 1.0)}, "weights must be a list"),
            ({"weights": (2.0, 1.0)}, "weights must have mean 1, got a mean of 1.5"),
            ({"beta": 0}, "beta must be above 0 and below 3e38, got 0"),
            ({"beta": math.inf}, "beta must be"),
            ({"form": None}, "form must be a text, got None"),
            ({"images": -1}, "images must be a whole number of at least 0, got -1"),
            ({"gain": math.nan}, "gain must be a finite number, got nan"),
            ({"error": -1}, "error must be a finite number, got -1"),
        ],
    )
    def test_bad_input(self, change: dict, message: str, tmp_path: Path) -> None:
        with pytest.raises(DiveFastError, match=message):
            dataclasses.replace(HALVES, **change)

    @pytest.mark.parametrize("values", [None, [1], {}, {**HALVES.to_dict(), "more": 1}])
    def test_damaged(self, values: object, tmp_path: Path) -> None:
        with pytest.raises(DiveFastError, match="loss weights must hold exactly n_timesteps, we"):
            LossWeights.from_dict(values)


class TestAnswers:
    def test_losses_are_the_weighted_means(self, toy: tuple) -> None:
        clf, x0, _ = toy
        clf.model.loss_weights = HALVES
        found = clf(latents=x0, strategy="enumerate", probes=64, timesteps="uniform")
        raw = clf.losses(latents=x0, probes=64)
        t = low_discrepancy_probes(64, 1000, SHAPE).timesteps
        expected = (raw * torch.where(t < 500, 1.5, 0.5)).mean(dim=2)
        for answer, losses in zip(found, expected, strict=True):
            torch.testing.assert_close(answer.losses, losses)
            posterior = (-HALVES.beta * losses.double()).log_softmax(dim=0)
            torch.testing.assert_close(answer.log_posterior.double(), posterior, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("strategy", ["enumerate", "race", "invert", "auto"])
    def test_every_strategy_follows_them(self, toy: tuple, strategy: str) -> None:
        clf, x0, _ = toy
        before = clf(latents=x0[:3], strategy=strategy, probes=64)
        clf.model.loss_weights = HALVES
        given = HALVES.placed(None).probes(64, SHAPE)
        by_hand = clf(latents=x0[:3], strategy=strategy, probes=given)
        for settings in ({}, {"weights": "learned"}, {"weights": HALVES}):
            found = clf(latents=x0[:3], strategy=strategy, probes=64, **settings)
            for a, b in zip(found, by_hand, strict=True):
                assert torch.equal(a.losses.nan_to_num(), b.losses.nan_to_num())
        found = clf(latents=x0[:3], strategy=strategy, probes=64, weights="uniform")
        for a, b in zip(found, before, strict=True):
            assert torch.equal(a.losses.nan_to_num(), b.losses.nan_to_num())
            assert torch.equal(a.log_posterior, b.log_posterior)

    def test_race_and_auto_answer_as_enumeration_does(self) -> None:
        """On weighted losses, however extreme: three bins in twenty count, the others hardly."""
        clf = DiffusionClassifier(ToyModel(spread=0.4))
        w = torch.full((20,), 0.01)
        w[4:7] = 6.0
        w = tuple((w / w.mean()).tolist())
        x0, _ = clf.model.toy.sample(40, generator(8))
        weights = LossWeights(1000, w, 50.0)
        full = clf(latents=x0, strategy="enumerate", weights=weights)
        for strategy, least in (("race", 39), ("auto", 36)):
            found = clf(latents=x0, strategy=strategy, weights=weights)
            same = sum(a.index == b.index for a, b in zip(found, full, strict=True))
            assert same >= least, strategy

    def test_with_learned_timesteps(self, toy: tuple) -> None:
        """A density that is learned goes on to be followed, times the weights."""
        clf, _, _ = toy
        clf.model.timesteps, clf.model.loss_weights = LOPSIDED, HALVES
        expected = HALVES.placed(LOPSIDED).probes(30, SHAPE)
        for settings in ({}, {"timesteps": "learned"}, {"weights": "learned"}):
            found = clf.probe_list(Auto(), 30, **settings)
            assert torch.equal(found.timesteps, expected.timesteps)
            assert torch.equal(found.weights, expected.weights)
        as_told = clf.probe_list(Auto(), 30, timesteps=LOPSIDED)
        assert torch.equal(as_told.timesteps, LOPSIDED.probes(30, SHAPE).timesteps)
        even = clf.probe_list(Auto(), 30, timesteps="uniform")
        assert torch.equal(even.timesteps, low_discrepancy_probes(30, 1000, SHAPE).timesteps)
        plain = clf.probe_list(Auto(), 30, weights="uniform")
        assert torch.equal(plain.weights, LOPSIDED.probes(30, SHAPE).weights)

    def test_what_does_not_use_them(self, toy: tuple) -> None:
        clf, x0, _ = toy
        x0 = x0[:2]

        def found() -> list[torch.Tensor]:
            return [
                clf.losses(latents=x0, probes=8),
                clf.error_maps(latents=x0, probes=8),
                clf.log_likelihood(latents=x0, classes=[0], probes=8).values,
            ]

        before, published = found(), clf.probe_list(DivePaper())
        own = clf.probe_list(Enumerate(), low_discrepancy_probes(5, 1000, SHAPE))
        clf.model.loss_weights = HALVES
        assert all(map(torch.equal, before, found()))
        assert clf.probe_list(DivePaper()).weights is published.weights is None
        assert own.weights is None
        # A predictor that has no classes of the model's own leaves them out unless told.
        assert Predictor(clf.model).probe_list(Auto()).weights is None

    def test_a_map_weighs_as_the_answer_does(self, toy: tuple) -> None:
        clf, x0, _ = toy
        clf.model.loss_weights = HALVES
        (found,) = clf.explain(latents=x0[:1], a=0, b=1, probes=16)
        probes = HALVES.placed(None).probes(16, SHAPE)
        losses = clf.losses(latents=x0[:1], probes=probes).mean(dim=2)[0]
        assert found.gap == pytest.approx((losses[1] - losses[0]).item(), rel=1e-3)
        (plain,) = clf.explain(latents=x0[:1], a=0, b=1, probes=16, weights="uniform")
        losses = clf.losses(latents=x0[:1], probes=16).mean(dim=2)[0]
        assert plain.gap == pytest.approx((losses[1] - losses[0]).item(), rel=1e-3)

    def test_a_prior_is_weighed_by_their_beta(self, toy: tuple) -> None:
        clf, x0, _ = toy
        prior = [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
        weights = dataclasses.replace(HALVES, beta=3.0)
        plain = clf(latents=x0[:1], strategy="enumerate", weights=weights)[0]
        found = clf(latents=x0[:1], strategy="enumerate", weights=weights, prior=prior)[0]
        expected = -3.0 * plain.losses.double() + torch.tensor(prior, dtype=torch.float64).log()
        torch.testing.assert_close(
            found.log_posterior.double(), expected.log_softmax(dim=0), atol=1e-4, rtol=0
        )

    def test_identity(self, toy: tuple) -> None:
        clf, _, _ = toy
        before = clf.identity(strategy="enumerate")
        clf.model.loss_weights = HALVES
        assert clf.identity(strategy="enumerate", weights="uniform") == before
        found = clf.identity(strategy="enumerate")
        assert found["loss_weights"] == [1.5, 0.5] and found["beta"] == 20.0
        assert "loss_weights" not in before and before["beta"] == 9.0
        even = clf.identity(strategy="enumerate", timesteps="uniform")
        assert even["timesteps"] != found["timesteps"]
        assert json.dumps(found)

    def test_bad_input(self, toy: tuple) -> None:
        clf, x0, _ = toy
        with pytest.raises(ModelError, match="toy has no learned weights; see fit_weights"):
            clf(latents=x0, weights="learned")
        for weights in ("best", 3, HALVES.to_dict(), LOPSIDED):
            for call in (clf, clf.explain):
                with pytest.raises(DiveFastError, match="'learned', 'uniform' or LossWeights, got"):
                    call(latents=x0, weights=weights)
        given = low_discrepancy_probes(5, 1000, SHAPE)
        for settings in ({"probes": given}, {"preset": "dive-paper"}):
            with pytest.raises(DiveFastError, match="weights need a list of probes that is ours"):
                clf(latents=x0, weights=HALVES, **settings)
        clf.model.loss_weights = LossWeights(50, (1.0,), 1.0)
        with pytest.raises(ModelError, match="1000 timesteps, but these were learned for 50"):
            clf(latents=x0)
        with pytest.raises(DiveFastError, match="weights 'learned' or 'uniform', got LossWeights"):
            clf.calibrate(latents=x0, labels=[0] * 12, weights=HALVES)
        clf.model.loss_weights = "w"
        with pytest.raises(ModelError, match="'loss_weights' of toy to be LossWeights or None"):
            DiffusionClassifier(clf.model)


class TestFit:
    def test_they_raise_the_accuracy_on_other_images(self, misled) -> None:
        clf = misled
        clf.model.rows.clear()
        x0, labels = clf.model.toy.sample(60, generator(1))
        fitted = clf.fit_weights(latents=x0, labels=labels, probes=64)
        assert fitted.weights is clf.model.loss_weights is not None
        assert fitted.evaluations == sum(clf.model.rows) == 60 * evaluations_per_image(6, 64, 9)
        w = fitted.weights.weights
        assert sum(w[:6]) > 0.7 * sum(w)
        other, truth = clf.model.toy.sample(80, generator(2))
        settings = {"strategy": "enumerate", "probes": 64}
        with_them = clf(latents=other, **settings)
        without = clf(latents=other, **settings, weights="uniform")
        right = [
            sum(a.index == int(y) for a, y in zip(found, truth, strict=True))
            for found in (with_them, without)
        ]
        assert right[0] >= right[1] + 8
        nll = [
            -sum(a.log_posterior[y].item() for a, y in zip(found, truth, strict=True)) / 80
            for found in (with_them, without)
        ]
        assert nll[0] < nll[1]
        assert "nats an image left out" in str(fitted) and "beta" in str(fitted)

    def test_labels_without_meaning_leave_them_uniform(self, misled) -> None:
        clf = misled
        clf.model.loss_weights = HALVES
        x0, _ = clf.model.toy.sample(40, generator(1))
        labels = torch.randint(6, (40,), generator=generator(4))
        fitted = clf.fit_weights(latents=x0, labels=labels, probes=64)
        assert fitted.weights is None and clf.model.loss_weights is None
        assert "the weights stay uniform" in str(fitted)

    def test_hardest_rivals_of_many(self) -> None:
        clf = DiffusionClassifier(ToyModel(n_classes=12, spread=0.4))
        x0, labels = clf.model.toy.sample(20, generator(1))
        fitted = clf.fit_weights(latents=x0, labels=labels, probes=64, rivals=3)
        assert sum(clf.model.rows) == fitted.evaluations == 20 * (11 * 20 + 4 * 64)

    def test_determinism(self, misled) -> None:
        clf = misled
        x0, labels = clf.model.toy.sample(30, generator(1))
        first = clf.fit_weights(latents=x0, labels=labels, probes=64)
        clf.batch_size = 7
        again = clf.fit_weights(latents=x0, labels=labels, probes=64)
        assert [t.gain for t in again.trials] == pytest.approx(
            [t.gain for t in first.trials], abs=1e-2
        )

    def test_calibration_fits_the_beta_in_use(self, toy: tuple) -> None:
        clf, x0, labels = toy
        clf.model.loss_weights = HALVES
        record = clf.calibrate(latents=x0, labels=labels, probes=20)
        assert record.beta_before == 20.0 and clf.model.inverse_temperature == 9.0
        assert clf.model.loss_weights == dataclasses.replace(HALVES, beta=record.beta_after)
        record = clf.calibrate(latents=x0, labels=labels, probes=20, weights="uniform")
        assert record.beta_before == 9.0 and clf.model.inverse_temperature == record.beta_after

    def test_a_shortlist_belongs_to_its_weights(self, toy: tuple, caplog) -> None:
        clf, x0, _ = toy
        plain = clf.fit_shortlist(latents=x0, probes=8)
        clf.model.shortlist = plain  # whether it spares evaluations does not matter here
        before = clf.identity()
        assert plain.weights == "" and "shortlist" in before
        clf.model.loss_weights = HALVES
        assert "shortlist" not in clf.identity()
        assert clf.identity(weights="uniform") == before
        weighted = clf.fit_shortlist(latents=x0, probes=8)
        clf.model.shortlist = weighted
        assert weighted.weights == digest_of(HALVES) and weighted.curvature != plain.curvature
        assert "shortlist" in clf.identity() and "shortlist" not in clf.identity(weights="uniform")
        # Of another beta the losses are the same.
        clf.model.loss_weights = dataclasses.replace(HALVES, beta=1.0)
        assert "shortlist" in clf.identity()

    def test_a_shortlist_of_other_weights_is_told(self, misled, caplog) -> None:
        clf = DiffusionClassifier(Misled(spread=0.3))
        x0, labels = clf.model.toy.sample(40, generator(1))
        clf.model.shortlist = clf.fit_shortlist(latents=x0[:4], probes=8)
        caplog.clear()
        assert clf.fit_weights(latents=x0, labels=labels, probes=64).weights is not None
        (said,) = caplog.messages
        assert "learned from losses of other weights and is left out with these" in said

    def test_bad_input(self, toy: tuple) -> None:
        clf, x0, labels = toy
        data = {"latents": x0, "labels": labels}
        many = {"latents": x0.repeat(2, 1, 1, 1), "labels": labels.repeat(2)}
        for arguments, message in [
            ({}, "either images or latents"),
            (data, "20 images or more, got 12"),
            ({**many, "labels": None}, "labels must be"),
            ({**many, "labels": labels}, r"shape \[24\]"),
            ({**many, "labels": labels.repeat(2) + 6}, r"labels must lie in \[0, 6\)"),
            ({**many, "rivals": 0}, "rivals must be at least 1, got 0"),
            ({**many, "folds": 1}, "folds must be at least 2, got 1"),
            ({**many, "folds": 21}, "folds must be at most 20, got 21"),
            ({**many, "probes": 0}, "at least 1, got 0"),
            ({**many, "probes": 30}, "at least 2 probes in each of 20 bins"),
            ({**many, "seed": -1}, "seed"),
        ]:
            with pytest.raises(DiveFastError, match=message):
                clf.fit_weights(**arguments)
        assert clf.model.rows == []
        one = DiffusionClassifier(ToyModel(n_classes=1))
        with pytest.raises(DiveFastError, match="toy has one class"):
            one.fit_weights(latents=many["latents"], labels=[0] * 24)
