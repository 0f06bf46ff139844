"""What users call: inputs, answers, raw losses, priors, traces, other models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from toy_model import ToyModel

import dive_fast
from dive_fast import Classification, DiffusionClassifier, DiveFastError, ImageError, ModelError
from dive_fast.data.digits import NAMES, load_digits


@pytest.fixture(scope="module")
def classifier():
    return DiffusionClassifier.from_pretrained("digits")


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return load_digits("test")


@pytest.fixture(scope="module")
def toy_classifier():
    return DiffusionClassifier(ToyModel())


def test_the_embedded_model_reads_held_out_digits(classifier, digits):
    for strategy in ("enumerate", "invert"):
        answers = classifier(digits.images[:30], strategy=strategy, probes=40)
        right = [a.index == y for a, y in zip(answers, digits.labels[:30], strict=True)]
        # 99.5% over all 397; one of thirty may go wrong with fewer probes.
        assert sum(right) >= 29
        assert all(a.label == NAMES[a.index] for a in answers)


def test_every_form_of_an_image_gives_the_same_answer(classifier, digits, tmp_path):
    pixels = digits.images[0]
    path = tmp_path / "digit.png"
    Image.fromarray(pixels).save(path)
    forms = [
        Image.fromarray(pixels),
        str(path),
        path,
        pixels,
        pixels / np.float32(255),
        torch.from_numpy(pixels)[None],
        [pixels],
    ]
    (first,) = classifier(forms[0], strategy="enumerate", probes=5)
    for form in forms:
        (answer,) = classifier(form, strategy="enumerate", probes=5)
        torch.testing.assert_close(answer.losses, first.losses)
    many = classifier([forms[0], forms[3], forms[1]], strategy="enumerate", probes=5)
    assert [a.index for a in many] == [first.index] * 3
    (latent,) = classifier(latents=classifier.encode(pixels), strategy="enumerate", probes=5)
    torch.testing.assert_close(latent.losses, first.losses)


def test_a_classification_is_plain_to_use(classifier, digits):
    answer = classifier(digits.images[0], strategy="enumerate", probes=20)[0]
    assert isinstance(answer, Classification)
    assert answer.label == classifier.names[answer.index] == answer.top(1)[0]["label"]
    assert answer.evaluations == 200 and answer.seconds > 0
    assert answer.log_posterior.exp().sum() == pytest.approx(1.0, rel=1e-5)
    assert answer.n_probes.tolist() == [20] * 10
    top = answer.top(3)
    assert [set(entry) for entry in top] == [{"label", "index", "score"}] * 3
    assert top[0]["score"] >= top[1]["score"] >= top[2]["score"]
    assert answer.trace is None
    content = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    assert content["label"] == answer.label and len(content["losses"]) == 10


def test_classes_that_were_not_measured_are_told_apart(classifier, digits):
    answer = classifier(digits.images[0], strategy="invert")[0]
    unmeasured = answer.n_probes == 0
    assert unmeasured.any()
    assert answer.losses[unmeasured].isnan().all()
    assert (answer.log_posterior[unmeasured] == -math.inf).all()
    assert len(answer.top(10)) == int((~unmeasured).sum())
    content = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    assert content["losses"].count(None) == int(unmeasured.sum())


def test_raw_losses_are_what_enumeration_averages(classifier, digits):
    images = digits.images[:3]
    losses = classifier.losses(images, probes=12)
    assert losses.shape == (3, 10, 12) and losses.dtype == torch.float32
    for answer, matrix in zip(
        classifier(images, strategy="enumerate", probes=12, timesteps="uniform"),
        losses,
        strict=True,
    ):
        torch.testing.assert_close(answer.losses, matrix.mean(dim=1))
    part = classifier.losses(images, classes=[7, 2], probes=12)
    torch.testing.assert_close(part, losses[:, [7, 2]], rtol=1e-4, atol=1e-5)
    other_noise = classifier.losses(images, probes=12, seed=1)
    assert not torch.allclose(other_noise, losses, atol=1e-3)


def test_a_prior_moves_the_answer_as_bayes_says(toy_classifier):
    x0, _ = toy_classifier.model.toy.sample(1, torch.Generator().manual_seed(0))
    plain = toy_classifier(latents=x0, strategy="enumerate")[0]
    order = plain.log_posterior.argsort(descending=True)
    # Weigh the second class up by more than what parts it from the first.
    prior = torch.ones(6)
    gap = (plain.log_posterior[order[0]] - plain.log_posterior[order[1]]).item()
    prior[order[1]] = math.exp(gap + 1)
    moved = toy_classifier(latents=x0, strategy="enumerate", prior=prior)[0]
    assert moved.index == int(order[1]) and moved.label == toy_classifier.names[moved.index]
    expected = (plain.log_posterior + prior.log()).log_softmax(0)
    torch.testing.assert_close(moved.log_posterior, expected, rtol=1e-4, atol=1e-4)


def test_trace_keeps_what_the_strategy_saw(classifier, digits):
    image = digits.images[1]
    paper = classifier(image, preset="dive-paper", probes=25, loops=4, trace=True)[0].trace
    assert len(paper["monitor_losses"]) == len(paper["monitor_classes"]) == 4
    assert len(paper["step_losses"]) == len(paper["step_classes"]) == 4
    ours = classifier(image, strategy="invert", trace=True)[0].trace
    assert len(ours["path"]) >= 2 and ours["losses"].shape == (10, 100)


def test_the_same_seed_gives_the_same_answer_and_draws_leave_the_global_state_alone(toy_classifier):
    x0 = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    state = torch.random.get_rng_state()
    first = toy_classifier(latents=x0, preset="dive-paper", probes=25, loops=2, trace=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    second = toy_classifier(latents=x0, preset="dive-paper", probes=25, loops=2, trace=True)
    for a, b in zip(first, second, strict=True):
        assert a.trace["step_losses"] == b.trace["step_losses"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inversion_works_where_the_caller_switched_gradients_off(classifier, digits, mode):
    image = torch.from_numpy(digits.images[2])[None]
    expected = classifier(image, strategy="invert")[0]
    with mode():
        found = classifier(image, strategy="invert")[0]
        latent = classifier(latents=torch.tensor(digits.images[2:3, None] / 127.5 - 1))[0]
        paper = classifier(image, preset="dive-paper", probes=25, loops=2)[0]
    assert found.index == expected.index == latent.index
    assert paper.evaluations == 2 * 75
    torch.testing.assert_close(found.losses, expected.losses, equal_nan=True)


def test_any_object_of_the_protocol_is_a_model(toy_classifier):
    x0, labels = toy_classifier.model.toy.sample(20, torch.Generator().manual_seed(2))
    found = [a.index for a in toy_classifier(latents=x0)]
    assert sum(f == y for f, y in zip(found, labels.tolist(), strict=True)) >= 18


def test_a_family_registers_from_outside(tmp_path, monkeypatch):
    from dive_fast.models import source

    monkeypatch.setattr(source, "FAMILIES", dict(source.FAMILIES))
    (tmp_path / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
    with pytest.raises(ModelError, match="ToyPipeline', which is not supported; supported are"):
        DiffusionClassifier.from_pretrained(tmp_path)

    class Movable(ToyModel):
        def to(self, device, dtype):
            return self

    dive_fast.register_model_family("ToyPipeline", lambda directory, **options: Movable())
    classifier = DiffusionClassifier.from_pretrained(tmp_path)
    assert classifier(latents=torch.zeros(1, 2, 3, 3), strategy="enumerate")[0].evaluations == 600


def test_bad_input(classifier, toy_classifier):
    good = torch.zeros(1, 1, 8, 8)
    bad = [
        ({}, DiveFastError, "expected either images or latents"),
        ({"images": [], "strategy": "invert"}, ImageError, "expected at least one image"),
        ({"latents": good[0]}, ImageError, r"shape \[B, 1, 8, 8\], got \[1, 8, 8\]"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, ImageError, r"\[B, 1, 8, 8\]"),
        ({"latents": good / 0}, ImageError, "finite"),
        ({"latents": good, "prior": [1.0]}, DiveFastError, "prior must hold 10 weights"),
        ({"latents": good, "prior": [-1.0] * 10}, DiveFastError, "prior must hold 10 weights"),
        ({"latents": good, "probes": 0}, DiveFastError, "at least 1, got 0"),
        ({"images": np.full((8, 8), np.nan)}, ImageError, "NaN"),
        ({"images": np.zeros((2, 2, 2, 2, 2))}, ImageError, "expected"),
    ]
    for arguments, kind, message in bad:
        with pytest.raises(kind, match=message):
            classifier(**arguments)
    with pytest.raises(DiveFastError, match=r"classes must lie in \[0, 10\), got \[10\]"):
        classifier.losses(latents=good, classes=[10])
    with pytest.raises(DiveFastError, match="batch_size must be at least 1, got 0"):
        DiffusionClassifier.from_pretrained("digits", batch_size=0)
    for arguments, message in [
        ({"dtype": "int8"}, "expected a dtype of float32, bfloat16, float16, got 'int8'"),
        ({"device": "moon"}, "the device 'moon' cannot be used"),
        ({"timestep_embedding": "x"}, "expected a timestep_embedding of auto"),
    ]:
        with pytest.raises(ModelError, match=message):
            DiffusionClassifier.from_pretrained("digits", **arguments)
