"""What the calls of classifier and detector refuse, each in one sentence."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from toy_layout import SCENE, PictureModel
from toy_model import ToyModel

from dive_fast import (
    DiffusionClassifier,
    DiveFastError,
    EngineOptions,
    ImageError,
    LayoutDetector,
    ModelError,
    ProbeList,
    sample,
)
from dive_fast.errors import shown
from dive_fast.predict.calibration import expected_calibration_error, fit_beta
from dive_fast.strategies import Race

C = 6
X0 = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
WHOLE = [True, np.True_, 2.5, 2.0, math.nan, "100", None, [3], torch.tensor(3), {}, 10**5000]


def printed(value: object) -> str:
    """A test's id; without addresses, which differ from process to process."""
    return re.sub(r" at 0x\w+", "", str(value))[:24]


def named(value: object) -> str:
    return f"{type(value).__name__} {shown(value)}"


@pytest.fixture
def clf() -> DiffusionClassifier:
    return DiffusionClassifier(ToyModel(C), batch_size=64)


@pytest.fixture(scope="module")
def picture():
    return PictureModel().draw(SCENE)[0]


def refused(call, *names: str) -> str:
    """The one sentence, which names all of these."""
    with pytest.raises(DiveFastError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message[-1] in ".)" and len(message) < 600, message
    assert all(name in message for name in names), message
    return message


@pytest.mark.parametrize(
    ("prior", "got"),
    [
        ([1.0] * 5, "got shape [5]"),
        ([[1.0] * C], "got shape [1, 6]"),
        (1.0, "got shape []"),
        ([], "got shape [0]"),
        ([0.0] * C, "one above 0, got zeros only"),
        ([1.0] * 5 + [math.inf], "got inf"),
        ([1.0] * 5 + [math.nan], "got nan"),
        ([1.0] * 5 + [-0.5], "got -0.5"),
        ({"cat": 1.0}, "got {'cat': 1.0}"),
        ("uniform", "got 'uniform'"),
        (["1"] * C, "got ['1'"),
        ([[1.0], [1.0, 2.0]], "got [[1.0]"),
        ([True] * C, "got [True"),
        (torch.ones(C, dtype=torch.complex64), "got a tensor of complex64 [6]"),
        (torch.ones(C).to_sparse(), "got a tensor of float32 [6]"),
        (object(), "got <object"),
    ],
    ids=printed,
)
def test_prior(clf, prior: object, got: str) -> None:
    expected = f"prior must hold {C} weights, finite and at least 0"
    refused(lambda: clf(latents=X0, prior=prior, probes=2), expected, got)


def test_prior_of_any_scale(clf) -> None:
    """Only the ratios count, also of numbers whose sum is none."""
    weights = torch.tensor([1.0, 2, 3, 4, 0, 5], dtype=torch.float64)
    options = {"strategy": "enumerate", "probes": 4}
    (expected, *_) = clf(latents=X0, prior=weights, **options)
    for prior in (weights * 3e307, weights.tolist(), weights.numpy(), [1, 2, 3, 4, 0, 5]):
        (found, *_) = clf(latents=X0, prior=prior, **options)
        torch.testing.assert_close(found.log_posterior, expected.log_posterior)
    assert expected.log_posterior[4] == -math.inf


@pytest.mark.parametrize("value", [*WHOLE, 0, -1, 10**12], ids=named)
def test_probes(clf, picture, value: object) -> None:
    if value is not None:  # the strategy's own choice
        for strategy in ("enumerate", "race", "auto", "invert"):
            refused(lambda s=strategy: clf(latents=X0, strategy=s, probes=value), "probes must be")
        refused(lambda: list(clf.stream(latents=[], probes=value)), "probes must be")
        refused(lambda: clf.losses(latents=X0, probes=value), "probes must be")
        refused(lambda: clf.identity(probes=value), "probes must be")
        refused(lambda: LayoutDetector(PictureModel())(picture, probes=value), "probes must be")
        refused(lambda: LayoutDetector(PictureModel()).identity(probes=value), "probes must be")
        refused(lambda: clf.calibrate(latents=X0, labels=[0, 1], probes=value), "probes must be")
    refused(lambda: clf.fit_timesteps(latents=X0, labels=[0, 1], probes=value), "probes must be")
    refused(lambda: clf.fit_shortlist(latents=X0, probes=value), "probes must be")


@pytest.mark.parametrize("value", [*WHOLE, -1, 2**63, 2**70], ids=named)
def test_seed(clf, picture, value: object) -> None:
    calls = [
        lambda: clf(latents=X0, seed=value, probes=2),
        lambda: clf(latents=X0, seed=value, preset="dive-paper"),
        lambda: clf.losses(latents=X0, seed=value, probes=2),
        lambda: clf.identity(seed=value),
        lambda: clf.calibrate(latents=X0, labels=[0, 1], seed=value),
        lambda: clf.fit_timesteps(latents=X0, labels=[0, 1], seed=value),
        lambda: clf.fit_shortlist(latents=X0, seed=value),
        lambda: LayoutDetector(PictureModel())(picture, seed=value),
        lambda: LayoutDetector(PictureModel()).identity(seed=value),
        lambda: sample(clf.model, [0], seed=value),
    ]
    for call in calls:
        refused(call, "seed must be")


@pytest.mark.parametrize("value", [*WHOLE, 0, -1], ids=named)
def test_numbers_of_other_names(clf, value: object) -> None:
    if value is not None:
        for make in (DiffusionClassifier, sample_with):
            refused(lambda m=make: m(ToyModel(), batch_size=value), "batch_size must be")
        refused(lambda: LayoutDetector(PictureModel(), batch_size=value), "batch_size must be")
        refused(lambda: clf.fit_timesteps(generate=value), "generate must be")
        refused(lambda: clf.fit_shortlist(generate=value), "generate must be")
    labelled = {"latents": X0, "labels": [0, 1]}
    refused(lambda: clf.fit_timesteps(**labelled, rivals=value), "rivals must be")
    refused(lambda: sample(clf.model, [0], steps=value), "steps must lie in [1, 1000]")
    refused(lambda: LayoutDetector(PictureModel(), prior_probes=value), "prior_probes must be")
    refused(lambda: EngineOptions(refresh=value), "refresh must be")
    refused(lambda: expected_calibration_error([0.5], [True], value), "bins must be")


def sample_with(model, batch_size: object) -> None:
    sample(model, [0], batch_size=batch_size)


@pytest.mark.parametrize("value", [*WHOLE, -1], ids=named)
def test_numbers_from_zero(clf, picture, value: object) -> None:
    (answer, *_) = clf(latents=X0, probes=2)
    refused(lambda: answer.to_dict(top=value), "top must be")
    refused(lambda: answer.top(value), "top must be")
    refused(lambda: EngineOptions(cache_bytes=value), "cache_bytes must be")
    if value is not None:
        refused(lambda: list(clf.stream(latents=[], progress=value)), "progress must be")
        detector = LayoutDetector(PictureModel())
        refused(lambda: list(detector.stream([], progress=value)), "progress must be")


def test_numbers_of_numpy_are_numbers(clf) -> None:
    expected = clf(latents=X0, strategy="enumerate", probes=3, seed=2)
    found = clf(latents=X0, strategy="enumerate", probes=np.int64(3), seed=np.uint8(2))
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(found, expected, strict=True))
    assert len(found[0].to_dict(top=np.int32(2))["top"]) == 2
    assert found[0].to_dict(top=0)["top"] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "all"}, {"cache": None}, {"cache": ["off"]}, {"cache": np.array(["off", "off"])},
        {"autocast": "float16"}, {"autocast": True}, {"autocast": torch.bfloat16},
        {"compile": 1}, {"compile": "yes"}, {"channels_last": None},
    ],
    ids=printed,
)  # fmt: skip
def test_engine_options(settings: dict) -> None:
    refused(lambda: EngineOptions(**settings), next(iter(settings)))


@pytest.mark.parametrize("options", [{}, "fast", EngineOptions], ids=printed)
def test_options_that_are_none(options: object) -> None:
    refused(lambda: DiffusionClassifier(ToyModel(), options=options), "options must be EngineOptio")


ROWS = [[], [0.5], [True, False], ["cat"], "cat", None, {}, [[0, 1]], [[0], [1, 2]], [2**70],
        torch.zeros(2), torch.zeros(1, 1).long(), [C], [-1], [0, 10**9]]  # fmt: skip


@pytest.mark.parametrize("value", ROWS, ids=printed)
def test_classes(clf, value: object) -> None:
    if value is not None:
        refused(lambda: clf.losses(latents=X0, classes=value, probes=2), "classes must")
    refused(lambda: sample(clf.model, value, steps=2), "classes must")


@pytest.mark.parametrize(
    "value",
    [*ROWS[:-3], [C, 0], [-1, 0], [0], [0, 1, 2], torch.tensor([0, 1]).to_sparse(), object(),
     np.array(["0", "1"]), np.array([0, 1], dtype=object).reshape(1, 2)],
    ids=printed,
)  # fmt: skip
def test_labels(clf, value: object) -> None:
    # Timesteps are fitted without labels too.
    for fit in (clf.calibrate,) if value is None else (clf.calibrate, clf.fit_timesteps):
        refused(lambda f=fit: f(latents=X0, labels=value, probes=100), "labels must")
    refused(lambda: fit_beta(torch.rand(2, C), value), "labels must")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64, np.int32])
def test_labels_of_any_whole_dtype(dtype) -> None:
    labels = np.array([1, 0, 1, 2], dtype=dtype)
    losses = torch.eye(3)[[0, 1, 2, 0]]
    assert fit_beta(losses, labels) == fit_beta(losses, labels.tolist())


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (["a", "b"], "latents must have shape [B, 2, 3, 3], got ['a', 'b']"),
        ("image.png", "got 'image.png'"),
        ({}, "got {}"),
        ([[0.0], [1.0, 2.0]], "got [[0.0], [1.0, 2.0]]"),
        (X0[0], "got [2, 3, 3]"),
        (X0[:, :1], "got [2, 1, 3, 3]"),
        (X0[None], "got [1, 2, 2, 3, 3]"),
        (0.0, "got []"),
        ((255 * X0).byte(), "latents must be floats of the model's scale, got uint8"),
        (X0 > 0, "got bool"),
        (X0.to(torch.complex64), "got complex64"),
        (X0.to_sparse(), "got a tensor of float32"),
        (X0 / 0, "latents must be finite"),
    ],
    ids=printed,
)
def test_latents(clf, latents: object, message: str) -> None:
    for call in (
        lambda: clf(latents=latents, probes=2),
        lambda: clf.losses(latents=latents, probes=2),
        lambda: clf.calibrate(latents=latents, labels=[0, 1]),
        lambda: clf.fit_timesteps(latents=latents, labels=[0, 1]),
        lambda: clf.fit_shortlist(latents=latents, probes=4),
    ):
        refused(call, message)
    with pytest.raises(ImageError):
        clf(latents=latents)


def test_latents_in_other_forms(clf) -> None:
    expected = clf(latents=X0, strategy="enumerate", probes=3)
    for latents in (X0.double(), X0.numpy(), X0.tolist(), X0.clone().requires_grad_()):
        found = clf(latents=latents, strategy="enumerate", probes=3)
        assert all(torch.equal(a.losses, b.losses) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "as pairs of a key and an image, got 3"),
        ("images", "got 'images'"),
        (X0, "got a tensor of float32 [2, 2, 3, 3]"),
        ([X0[0]], "got a tensor of float32 [2, 3, 3]"),
        ([("a", X0[0], 3)], "as pairs"),
        ([3], "got 3"),
        ([([], X0[0])], "got a list as key"),
    ],
    ids=printed,
)
def test_streams(clf, given: object, message: str) -> None:
    refused(lambda: list(clf.stream(latents=given, probes=2)), "expected latents", message)
    refused(lambda: list(clf.stream(given, probes=2)), "expected images", message)
    refused(lambda: list(LayoutDetector(PictureModel()).stream(given)), "expected images", message)


def test_one_image_for_each_key_of_a_stream(picture) -> None:
    model = ToyModel()
    model.image_shape, model.encode = (3, 4, 4), lambda images: images[:, :2, :3, :3]
    clf = DiffusionClassifier(model)
    message = "expected one image for each key, got 2"
    refused(lambda: list(clf.stream([("a", [picture, picture])], probes=2)), message)
    refused(lambda: list(clf.stream(latents=[("a", X0)], probes=2)), "shape [2, 3, 3], got [2, 2")


@pytest.mark.parametrize("strategy", [3, Race, {}, ["race"], object(), b"race"], ids=printed)
def test_strategies(clf, picture, strategy: object) -> None:
    refused(lambda: clf(latents=X0, strategy=strategy), "expected a strategy")
    refused(lambda: clf.identity(strategy=strategy), "expected a strategy")
    refused(lambda: LayoutDetector(PictureModel())(picture, strategy=strategy), "expected a strat")


@pytest.mark.parametrize("value", [3, True, ["dive-paper"], {}, "paper"], ids=printed)
def test_presets_timesteps_and_losses(clf, value: object) -> None:
    refused(lambda: clf(latents=X0, preset=value), "expected a preset of")
    refused(lambda: clf(latents=X0, timesteps=value), "expected timesteps 'learned', 'uniform'")
    refused(lambda: clf.losses(latents=X0, loss=value, probes=2), "expected a loss of l2, l1")
    array = np.array(["l2", "l1"])
    refused(lambda: clf(latents=X0, timesteps=array), "expected timesteps")
    refused(lambda: clf.losses(latents=X0, loss=array, probes=2), "expected a loss")


@pytest.mark.parametrize("value", ["1", True, math.nan, math.inf, None, [1.0], 10**400], ids=named)
def test_numbers_that_need_not_be_whole(clf, value: object) -> None:
    refused(lambda: sample(clf.model, [0], guidance=value, steps=2), "guidance must be")
    if value is not None:
        refused(lambda: LayoutDetector(PictureModel(), prior_weight=value), "prior_weight must be")


@pytest.mark.parametrize("prior", ["auto", 3, {}, torch.ones(3)], ids=printed)
def test_a_detector_s_prior(prior: object) -> None:
    refused(lambda: LayoutDetector(PictureModel(), prior), "expected a LayoutPrior or None")


@pytest.mark.parametrize("data", [None, "scenes", [], {}], ids=printed)
def test_data_of_a_detector(data: object) -> None:
    refused(lambda: LayoutDetector(PictureModel()).calibrate(data), "expected a CocoDataset")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timesteps", "ten"), ("timesteps", [1.5]), ("timesteps", [True]), ("timesteps", [[1]]),
        ("timesteps", [2**70]), ("noise", "white"), ("noise", [[1.0], [1.0, 2.0]]),
        ("noise", X0.to(torch.complex64)), ("noise", X0.to_sparse()), ("noise_index", [0.5]),
        ("noise_index", ["0"]), ("weights", ["1"]), ("weights", {}),
    ],
    ids=printed,
)  # fmt: skip
def test_lists_of_probes(name: str, value: object) -> None:
    refused(lambda: ProbeList(**{"timesteps": [1], "noise": X0, name: value}), name)


@pytest.mark.parametrize("directory", [3, True, [], {}, b"here"], ids=printed)
def test_directories(clf, directory: object) -> None:
    for call in (clf.save_fitted, clf.load_fitted):
        with pytest.raises(ModelError, match="expected a directory, got"):
            call(directory)


def test_figures_of_what_are_no_numbers() -> None:
    for losses in ("x", None, [[1.0]], torch.zeros(2, 2).long(), torch.zeros(2)):
        with pytest.raises(DiveFastError, match="losses"):
            fit_beta(losses, [0, 1])
    for confidence, correct in (
        (["a"], [True]),
        (None, [True]),
        ([0.5], ["yes"]),
        ([[0.5], 1], [1]),
    ):
        refused(lambda p=confidence, c=correct: expected_calibration_error(p, c), "expected conf")
