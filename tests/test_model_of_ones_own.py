"""Models of one's own behind the protocol: what they get wrong is one sentence that names them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_layout import SCENE, PictureModel
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, LayoutDetector, ModelError, sample
from dive_fast.core.schedule import Schedule
from dive_fast.engine import EngineOptions
from dive_fast.models.protocol import Model

X0 = torch.zeros(2, 2, 3, 3)
GONE = object()


def classify(model, strategy: str = "enumerate", **options):
    clf = DiffusionClassifier(model, batch_size=4, options=EngineOptions(**options))
    return clf(latents=X0, strategy=strategy, probes=4)


def toy(**attributes) -> ToyModel:
    """The toy with other attributes, or without."""
    model = ToyModel()
    for name, value in attributes.items():
        delattr(model, name) if value is GONE else setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    "name", ["name", "schedule", "vocabulary", "latent_shape", "image_shape", "device", "dtype",
             "inverse_temperature"],
)  # fmt: skip
def test_an_attribute_is_missing(name: str) -> None:
    with pytest.raises(ModelError, match=f"expected a model with '{name}', got .* without"):
        DiffusionClassifier(toy(**{name: GONE}))


@pytest.mark.parametrize("name", ["identity", "encode", "predict"])
def test_a_method_is_missing(name: str) -> None:
    methods = {m: getattr(ToyModel, m) for m in ("identity", "encode", "predict") if m != name}
    model = type("Mine", (), methods)()
    model.__dict__ |= vars(ToyModel())
    with pytest.raises(ModelError, match=f"expected a model with '{name}', got toy without"):
        DiffusionClassifier(model)
    with pytest.raises(ModelError, match=f"'{name}' of toy to be a method, got 3"):
        DiffusionClassifier(toy(**{name: 3}))


@pytest.mark.parametrize(
    "model", [None, "digits", 3, {}, object(), nn.Linear(2, 2), ToyModel, Model]
)
def test_no_model_at_all(model: object) -> None:
    for kind in (DiffusionClassifier, LayoutDetector):
        with pytest.raises(ModelError, match="^expected a"):
            kind(model)
    with pytest.raises(ModelError, match="^expected a model"):
        sample(model, [0])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": 3}, "'name' of ToyModel to be a text, got 3"),
        ({"schedule": "linear"}, "'schedule' of toy to be a dive_fast.core.schedule.Schedule"),
        ({"schedule": SimpleNamespace(a=1)}, "'schedule' of toy to be a"),
        ({"vocabulary": ["cat", "dog"]}, "'vocabulary' of toy to be a .*Vocabulary, got .'cat'"),
        ({"vocabulary": torch.eye(6)}, r"'vocabulary' of toy .* got float32 \[6, 6\]"),
        ({"latent_shape": 3}, r"'latent_shape' of toy to be three sizes \(C, h, w\), got 3"),
        ({"latent_shape": (2, 3)}, "'latent_shape' of toy to be three sizes"),
        ({"latent_shape": (2, 3.0, 3)}, "'latent_shape' of toy to be three sizes"),
        ({"latent_shape": (2, 0, 3)}, "'latent_shape' of toy to be three sizes"),
        ({"image_shape": "3x3"}, "'image_shape' of toy to be three sizes"),
        ({"image_shape": (3, 4, 5)}, "'image_shape' of toy to be square"),
        ({"device": "cpu"}, "'device' of toy to be a torch.device, got 'cpu'"),
        ({"dtype": "float32"}, "'dtype' of toy to be a torch.dtype, got 'float32'"),
        ({"dtype": torch.int8}, "'dtype' of toy to be one of floats, got int8"),
        ({"inverse_temperature": None}, "'inverse_temperature' of toy to be a number above 0"),
        ({"inverse_temperature": -1.0}, "'inverse_temperature' of toy to be a number above 0"),
        ({"inverse_temperature": math.nan}, "'inverse_temperature' of toy to be a number above 0"),
        ({"device": torch.device("cuda:99")}, "the device of toy to be .* got cuda:99"),
        ({"device": torch.device("meta")}, "the device of toy to be .* got meta"),
        ({"schedule": Schedule(torch.ones(3), torch.ones(3), "noise")}, "a target of .* 'noise'"),
        ({"default_cache": "all"}, "'default_cache' of toy to be off, exact or encoder, got 'all'"),
        ({"shortlist": [1]}, "'shortlist' of toy to be a Shortlist or None"),
        ({"network": "unet"}, "'network' of toy to be a torch.nn.Module or None, got 'unet'"),
        ({"timesteps": [1.0]}, "'timesteps' of toy to be a TimestepWeights or None"),
        ({"layout_format": {}}, "'layout_format' of toy to be a LayoutFormat or None"),
    ],
    ids=str,
)
def test_attributes_of_another_kind(attributes: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        DiffusionClassifier(toy(**attributes))


@pytest.mark.parametrize(
    "module", [nn.Dropout(0.5), nn.BatchNorm2d(2), nn.MultiheadAttention(4, 2, dropout=0.1)],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_a_network_in_training_mode(module: nn.Module) -> None:
    model = toy(inner=nn.Sequential(nn.Linear(2, 2), module))
    with pytest.raises(
        ModelError,
        match=f"toy to be frozen, got it in training mode, where {type(module).__name__}",
    ):
        DiffusionClassifier(model)
    model.inner.eval()
    DiffusionClassifier(model)
    # What is the same in training and outside may say what it likes.
    DiffusionClassifier(toy(inner=nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))))


class Wrapped(ToyModel):
    """The toy, whose prediction goes through a function."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def predict(self, x_t, t, condition):
        return self.change(super().predict(x_t, t, condition))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: SimpleNamespace(sample=p), "return .* got SimpleNamespace: return its 'sample'"),
        (lambda p: (p,), "return a tensor, got tuple"),
        (lambda p: None, "return a tensor, got NoneType"),
        (lambda p: p.numpy(), "return a tensor, got ndarray"),
        (lambda p: p[:, :1], r"return \[4, 2 or 4, 3, 3\], got \[4, 1, 3, 3\]"),
        (lambda p: p[:1], r"return \[4, 2 or 4, 3, 3\], got \[1, 2, 3, 3\]"),
        (lambda p: p.flatten(1), r"return .* got \[4, 18\]"),
        (lambda p: p.mean(), r"return .* got \[\]"),
        (lambda p: p[..., :2], r"return .* got \[4, 2, 3, 2\]"),
        (lambda p: p.double(), "return float32, bfloat16 or float16, got float64"),
        (lambda p: p.long(), "return float32, bfloat16 or float16, got int64"),
        (lambda p: p.to("meta"), "return a prediction on its device, cpu, got one on meta"),
    ],
)  # fmt: skip
def test_a_prediction_that_is_none(change, message: str) -> None:
    with pytest.raises(ModelError, match=f"expected 'predict' of toy to {message}"):
        classify(Wrapped(change))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", ["enumerate", "invert"])
def test_a_prediction_that_is_no_number(bad: float, strategy: str) -> None:
    """One class in one batch: it would count as not measured, or lose without a word."""

    def change(p):
        p = p.clone()
        p[-1, 0, 0, 0] = bad
        return p

    with pytest.raises(
        ModelError, match="expected finite .* from toy in torch.float32, got NaN or"
    ):
        classify(Wrapped(change), strategy)


@pytest.mark.parametrize("cut", [
    lambda p: p.detach(),
    lambda p: torch.zeros_like(p),
    lambda p: p.detach() * nn.Parameter(torch.ones(1)),  # a gradient, and not the condition's
], ids=["detached", "constant", "weights only"])  # fmt: skip
def test_a_gradient_that_is_cut(cut) -> None:
    assert len(classify(Wrapped(cut))) == 2  # nobody wants one here
    with pytest.raises(ModelError, match="prediction of toy to be differentiable in the condition"):
        classify(Wrapped(cut), "invert")

    class Still(ToyModel):
        @torch.no_grad()
        def predict(self, *arguments):
            return super().predict(*arguments)

    with pytest.raises(ModelError, match="prediction of toy to be differentiable in the condition"):
        classify(Still(), "invert")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("shapes do not fit\n\nat line 3"), "RuntimeError: shapes do not fit"),
        (TypeError("unexpected keyword"), "TypeError: unexpected keyword"),
        (KeyError("sample"), "KeyError: 'sample'"),
        (AssertionError(), "AssertionError: AssertionError"),
    ],
)  # fmt: skip
def test_a_network_that_fails(error: Exception, said: str) -> None:
    def fail(_):
        raise error

    with pytest.raises(ModelError) as caught:
        classify(Wrapped(fail))
    assert str(caught.value) == f"'predict' of toy failed with {said}"
    assert caught.value.__cause__ is error
    with pytest.raises(ModelError, match="'predict' of toy failed with"):
        sample(Wrapped(fail), [0], steps=2)

    model = toy(identity=lambda: fail(0))
    with pytest.raises(ModelError, match="'identity' of toy failed with"):
        DiffusionClassifier(model).identity()


def test_a_network_that_fails_in_its_backward() -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p):
            return p.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward here")

    with pytest.raises(ModelError, match="'backward' of toy failed with RuntimeError: no backward"):
        classify(Wrapped(Bad.apply), "invert")


@pytest.mark.parametrize("value", [None, "toy", [1], {"weights": {1, 2}}, {"x": math.nan}])
def test_an_identity_that_is_not_for_json(value: object) -> None:
    clf = DiffusionClassifier(toy(identity=lambda: value))
    with pytest.raises(ModelError, match="'identity' of toy to return a dictionary for JSON"):
        clf.identity()


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda x: None, r"return x0 of shape \[1, 2, 3, 3\], got None"),
        (lambda x: x[0], r"return x0 of shape \[1, 2, 3, 3\], got float32 \[3, 4, 4\]"),
        (lambda x: x[:, :2, :3, :3].long(), r"return floats, got int64 \[1, 2, 3, 3\]"),
        (lambda x: x[:, :2, :3, :3] / 0, "return finite numbers, got NaN or infinity"),
    ],
)
def test_an_encoder_that_makes_something_else(encode, message: str) -> None:
    clf = DiffusionClassifier(toy(image_shape=(3, 4, 4), encode=encode))
    with pytest.raises(ModelError, match=f"expected 'encode' of toy to {message}"):
        clf(torch.full((3, 4, 4), 0.5))
    with pytest.raises(ModelError, match=f"expected 'encode' of toy to {message}"):
        list(clf.stream([("a", torch.full((3, 4, 4), 0.5))]))


def test_an_encoder_in_double_precision_is_rounded() -> None:
    clf = DiffusionClassifier(
        toy(image_shape=(3, 4, 4), encode=lambda x: x[:, :2, :3, :3].double())
    )
    assert clf.encode(torch.full((3, 4, 4), 0.5)).dtype == torch.float32
    assert len(clf(torch.full((3, 4, 4), 0.5), strategy="enumerate", probes=2)) == 1


class Staged(ToyModel):
    """The toy in parts; ``wrong`` replaces what one of them returns."""

    def __init__(self, **wrong) -> None:
        super().__init__()
        self.wrong = wrong

    def part(self, name: str, value):
        return self.wrong[name](value) if name in self.wrong else value

    def prefix(self, x_t, t):
        return self.part("prefix", (x_t, t))

    def project(self, condition):
        return self.part("project", (condition,))

    def encoder(self, prefix, projected):
        return self.part("encoder", prefix)

    def decoder(self, encoded, projected):
        x_t, t = encoded
        return self.part("decoder", self.predict(x_t, t, projected[0]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prefix", lambda s: list(s), "'prefix' of toy to return a tuple of tensors .* got list"),
        ("prefix", lambda s: (s[0][:1], s[1]), "'prefix' of toy .* got float32 .1, 2, 3, 3. in it"),
        ("project", lambda s: s[0], "'project' of toy to return a tuple .* got Tensor"),
        ("encoder", lambda s: (None, s[1]), "'encoder' of toy .* got None in it"),
        ("decoder", lambda p: p[:, :1], "'decoder' of toy to return"),
        ("decoder", lambda p: 1 // 0, "'decoder' of toy failed with ZeroDivisionError"),
    ],
)
def test_parts_that_return_something_else(name: str, change, message: str) -> None:
    assert len(classify(Staged(), cache="exact")) == 2
    with pytest.raises(ModelError, match=message):
        classify(Staged(**{name: change}), cache="exact")


def test_a_detector_says_the_same() -> None:
    class Flat(PictureModel):
        def predict(self, *arguments):
            return super().predict(*arguments).flatten(1)

    (picture,) = PictureModel().draw(SCENE)
    with pytest.raises(ModelError, match="expected 'predict' of toy layout to return"):
        LayoutDetector(Flat())(picture)
    model = PictureModel()
    model.encode = lambda images: images[:, :1]
    with pytest.raises(ModelError, match="expected 'encode' of toy layout to return x0 of shape"):
        LayoutDetector(model)(picture)
