"""GeoDiffusion: layouts as prompts with location tokens, the same numbers as the pipeline's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_geodiffusion import GRID, LENGTH, PUBLISHED, write_geodiffusion
from tiny_sd import write_sd, write_sdxl

from dive_fast import LayoutDetector
from dive_fast.core.layouts import Layout
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models import load_model
from dive_fast.models.geodiffusion.encoder import LocationPromptEncoder
from dive_fast.models.geodiffusion.model import GeoDiffusion
from dive_fast.models.geodiffusion.prompts import LocationPrompts
from dive_fast.models.protocol import Model, StagedModel
from dive_fast.models.stable_diffusion import StableDiffusion
from dive_fast.models.text.towers import load_tower

CLASSES = ("cat", "dog", "of-cat", "owl")  # of 1, 2, 2 and 3 tokens
BOXES = torch.tensor([[0.0, 0.25, 0.5, 1.0], [0.5, 0.0, 1.0, 0.5], [0.25, 0.25, 0.75, 0.75]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_geodiffusion(tmp_path_factory.mktemp("geo") / "geo")


@pytest.fixture(scope="module")
def pipeline(directory) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(directory)


@pytest.fixture
def geo_model(directory) -> GeoDiffusion:
    return load_model(directory, device="cpu", classes=CLASSES)


def layouts() -> list[Layout]:
    """Of none to three objects, with phrases of every length."""
    ids = torch.tensor([0, 3, 2])
    return [Layout(BOXES[:n], ids[:n]) for n in range(4)]


def tokens_of(model: GeoDiffusion) -> torch.Tensor:
    return torch.stack([model.layout_format.encode(layout) for layout in layouts()])


def text_of(model: GeoDiffusion, tokens: torch.Tensor) -> torch.Tensor:
    shape = (model.layout_format.n_slots, model.vocabulary.dim)
    with torch.no_grad():
        return model.layout_encoder(model.embed(tokens).unflatten(1, shape))


def encode_prompts(pipeline: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.encode_prompt(prompts, "cpu", 1, False)[0]


def test_prompts_are_those_of_the_training(geo_model) -> None:
    assert [geo_model.prompt(layout) for layout in layouts()] == [
        "An image with ",
        "An image with cat <l5> <l22>",
        "An image with cat <l5> <l22> owl <l2> <l14>",
        "An image with cat <l5> <l22> owl <l2> <l14> of cat <l6> <l18>",
    ]


def test_embeddings_of_layouts_are_the_pipelines(geo_model, pipeline) -> None:
    expected = encode_prompts(pipeline, [geo_model.prompt(layout) for layout in layouts()])
    found = text_of(geo_model, tokens_of(geo_model))
    assert found.shape == (4, LENGTH, 12)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[1:] - found[:-1]).abs().amax(dim=(1, 2)).min() > 0.1


def test_every_class_alone_and_a_full_prompt(geo_model, pipeline) -> None:
    form = geo_model.layout_format
    # 40 tokens less start, end and 11 of the template leave five times three and two corners.
    assert form.max_objects == 5 and form.grid == GRID and form.names == CLASSES
    some = [Layout(BOXES[:1], torch.tensor([c])) for c in range(4)]
    some.append(Layout(BOXES[:1].repeat(5, 1), torch.full((5,), 3)))
    expected = encode_prompts(pipeline, [geo_model.prompt(layout) for layout in some])
    found = text_of(geo_model, torch.stack([form.encode(layout) for layout in some]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_absent_objects_may_stand_anywhere(geo_model) -> None:
    tokens = tokens_of(geo_model)[2]
    triples = tokens.view(-1, 3)
    moved = triples[[4, 0, 3, 2, 1]].flatten()
    assert (moved[:3] == geo_model.layout_format.none).all()
    both = text_of(geo_model, torch.stack([tokens, moved]))
    torch.testing.assert_close(both[0], both[1])


def test_an_encoder_with_a_mask_of_the_padding(directory) -> None:
    tower = load_tower(directory, "", "CLIPTextModel", False)
    prompts = LocationPrompts(CLASSES, ("cat", "dog", "of cat", "owl"), "An image {bbox}", GRID)
    encoder = LocationPromptEncoder(tower, prompts)
    tower.encoder.config.use_attention_mask = True
    tokens = encoder.layout_format.encode(layouts()[1])[None]
    batch = tower.tokenizer(
        ["An image cat <l5> <l22>"], padding="max_length", max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        found = encoder(encoder.table[tokens])
        expected = tower.encoder(batch.input_ids, attention_mask=batch.attention_mask)[0]
        unmasked = tower.encoder(batch.input_ids)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - unmasked).abs().max() > 1e-3


def test_prediction_is_the_pipelines_and_comes_in_parts(geo_model, pipeline) -> None:
    assert isinstance(geo_model, Model) and isinstance(geo_model, StagedModel)
    generator = torch.Generator().manual_seed(7)
    x_t = torch.randn(4, *geo_model.latent_shape, generator=generator)
    t = torch.tensor([3, 250, 500, 999])
    text = encode_prompts(pipeline, [geo_model.prompt(layout) for layout in layouts()])
    condition = geo_model.embed(tokens_of(geo_model))
    with torch.no_grad():
        expected = pipeline.unet(x_t, t, encoder_hidden_states=text).sample
        whole = geo_model.predict(x_t, t, condition)
        projected = geo_model.project(condition)
        parts = geo_model.decoder(geo_model.encoder(geo_model.prefix(x_t, t), projected), projected)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        other = geo_model.predict(x_t, t, condition.flip(0))
    assert (other - whole).abs().max() > 0.01


@pytest.mark.parametrize("relaxed", [False, True])
def test_gradients_are_those_of_finite_differences(geo_model, relaxed) -> None:
    geo_model.to("cpu", torch.float64)
    form, dim = geo_model.layout_format, geo_model.vocabulary.dim
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, *geo_model.latent_shape, generator=generator).double()
    t = torch.tensor([400])
    v = geo_model.embed(tokens_of(geo_model)[2:3]).double()
    if relaxed:
        # The second object's class is undecided between all, as in a search.
        rows = geo_model.vocabulary.table[slice(*form.class_range)]
        v.view(-1, dim)[3] = rows.mean(dim=0).double()

    def loss(condition: torch.Tensor) -> torch.Tensor:
        return geo_model.predict(x_t, t, condition).square().mean()

    v.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(v), v)
    gradient = gradient.view(-1, dim)
    # Class slot of the second object, both corners of the first.
    for slot, entry in ((3, 1), (3, 0), (1, 4), (2, 11)):
        step = torch.zeros_like(v)
        step.view(-1, dim)[slot, entry] = 1e-5
        with torch.no_grad():
            expected = (loss(v + step) - loss(v - step)) / 2e-5
        assert abs(expected) > 1e-6
        torch.testing.assert_close(gradient[slot, entry], expected, rtol=1e-4, atol=1e-9)
    # Nothing enters by objects that are not there, nor by what codes no class.
    assert (gradient[6:] == 0).all() and (gradient[0, len(CLASSES) :] == 0).all()


def test_a_mixture_is_as_long_as_most_of_it(geo_model, directory) -> None:
    table, encoder = geo_model.vocabulary.table, geo_model.layout_encoder
    embeddings = table[tokens_of(geo_model)[1]].repeat(3, 1, 1)
    embeddings[1, 0] = 0.6 * table[0] + 0.4 * table[3]
    embeddings[2, 0] = table[:4].mean(dim=0)  # two of four classes have two tokens
    prompts, real = encoder.write(embeddings)
    assert (real - real[0]).tolist() == [0, 0, 1]
    weight = encoder.text_encoder.get_input_embeddings().weight
    tokenizer = load_tower(directory, "", "CLIPTextModel", False).tokenizer
    ids = tokenizer(["cat", "dog", "of cat", "owl"]).input_ids
    cat, dog, of_cat, owl = (weight[row[1:-1]] for row in ids)
    phrase = slice(12, 12 + 1)
    torch.testing.assert_close(prompts[1, phrase], 0.6 * cat + 0.4 * owl[-1:])
    phrase = slice(12, 12 + 2)
    torch.testing.assert_close(
        prompts[2, phrase], (cat.expand(2, -1) + dog + of_cat + owl[-2:]) / 4
    )


def test_end_to_end(directory) -> None:
    detector = LayoutDetector.from_pretrained(directory, device="cpu", classes=CLASSES)
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    (found,) = detector(image, probes=6, margin=0.0)
    assert found.names == CLASSES and found.xyxy.shape == (len(found), 4)
    few = {"steps": 3, "step_probes": 2, "final_probes": 4, "margin": 0.0}
    (found,) = detector(image, strategy="invert", probes=6, **few)
    assert len(found) > 0 and (found.confidence > 0).all()
    assert (found.xyxy[:, 2:] <= torch.tensor([30.0, 20.0])).all()


def test_the_answer_does_not_depend_on_the_cache(directory) -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    answers = []
    for cache in ("off", "exact"):
        detector = LayoutDetector.from_pretrained(
            directory, device="cpu", classes=CLASSES, cache=cache
        )
        answers += detector(image, probes=4, margin=0.0)
    assert len(answers[0]) > 0
    torch.testing.assert_close(answers[0].xyxy, answers[1].xyxy)
    torch.testing.assert_close(answers[0].confidence, answers[1].confidence, rtol=1e-3, atol=1e-4)


def test_what_a_published_directory_states(tmp_path) -> None:
    """The size of its images (the UNet's configuration is that of Stable Diffusion's)."""
    config = {**PUBLISHED, "prompt_template": "An {bbox}, image", "max_num_bbox": 4}
    path = write_geodiffusion(tmp_path / "geo", config=config, published=False)
    model = load_model(path, device="cpu", classes={"kitten": "cat", "dog": "the dog"})
    assert model.image_shape == (3, 32, 32) and model.latent_shape == (4, 16, 16)
    assert model.layout_format.names == ("kitten", "dog")
    layout = Layout(BOXES[:2], torch.tensor([0, 1]))
    assert model.prompt(layout) == "An cat <l5> <l22> the dog <l2> <l14>, image"
    expected = encode_prompts(StableDiffusionPipeline.from_pretrained(path), [model.prompt(layout)])
    found = text_of(model, model.layout_format.encode(layout)[None])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.layout_format.max_objects == 4  # at most, where more would fit
    written = load_model(path, device="cpu", classes=["cat"], templates=["{} of dog"])
    assert written.prompt(Layout(BOXES[:1], torch.tensor([0]))) == "cat <l5> <l22> of dog"
    assert written.identity() != model.identity()


def test_equal_names_have_one_phrase(tmp_path, caplog) -> None:
    """They are told apart by their rows, which no prompt shows."""
    path = write_geodiffusion(tmp_path / "geo")
    model = load_model(path, device="cpu", classes=["cat", "dog", "cat"])
    assert model.layout_format.names == ("cat (0)", "dog", "cat (2)")
    one, two = (model.prompt(Layout(BOXES[:1], torch.tensor([row]))) for row in (0, 2))
    assert one == two and " cat <" in one and "(" not in one
    assert "'cat (0)', 'cat (2)'" in caplog.text


def test_a_plain_pipeline_stays_a_classifier(tmp_path) -> None:
    model = load_model(write_sd(tmp_path / "sd"), device="cpu", classes=CLASSES)
    assert isinstance(model, StableDiffusion)
    with pytest.raises(ModelError, match="expected a layout-to-image model, got .* has no layout"):
        LayoutDetector(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": None}, "is a text-conditional model and needs classes"),
        ({"classes": ["cat", "CAT"]}, "'cat' and 'CAT' have the same phrase"),
        ({"classes": {"cat": ["cat", "dog"]}}, "expected one phrase for the class 'cat'"),
        ({"classes": {"cat": " "}}, "the class 'cat' needs a phrase"),
        ({"classes": [f"a{'b' * i}" for i in range(12)]}, "at most 11 classes for a text encoder"),
        ({"classes": ["a" * 30]}, r"takes 32 tokens, but a prompt of 40 has room for 27"),
        ({"templates": ["with {camera} {bbox}"]}, "needs a value for {camera}: give it written"),
        ({"templates": ["An image"]}, "needs {bbox} once, where the objects go, got 'An image'"),
        ({"templates": ["a {bbox}", "the {bbox}"]}, "takes a list of one template"),
        ({"templates": ["An image with{bbox}"]}, "put spaces around {bbox}"),
        ({"average": "loss"}, "average is not for models with location tokens"),
        ({"timestep_embedding": "original"}, "timestep_embedding is not for models with location"),
    ],
)
def test_bad_options(directory, options: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_model(directory, device="cpu", **{"classes": CLASSES, **options})


@pytest.mark.parametrize(
    ("config", "n_tokens", "said"),
    [
        (None, 24, "expected the location tokens of a square grid in .*, got 24"),
        ({"num_bucket_per_side": [4, 6]}, 24, "on a square grid, got 4 columns and 6 rows"),
        ({"num_bucket_per_side": [5, 5]}, 24, "expected 25 location tokens in .*, got 24"),
        ({"num_bucket_per_side": 5}, 25, "expected two numbers above 1 as num_bucket_per_side"),
        ({"width": 32, "height": 16}, 25, "square images in .*, got width 32 and height 16"),
        ({"width": 33, "height": 33}, 25, "a multiple of 2 pixels for this VAE, got 33"),
        ({"prompt_template": 3}, 25, "needs {bbox} once"),
        ({"max_num_bbox": 0}, 25, "expected at least 1 object as max_num_bbox in .*, got 0"),
    ],
)
def test_bad_directories(tmp_path, config: dict | None, n_tokens: int, said: str) -> None:
    path = write_geodiffusion(tmp_path / "geo", config=config, n_tokens=n_tokens)
    with pytest.raises(ModelError, match=said):
        load_model(path, device="cpu", classes=CLASSES)


def test_location_tokens_in_sdxl(tmp_path) -> None:
    path = write_sdxl(tmp_path / "sdxl")
    (path / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<l0>": 44}))
    with pytest.raises(ModelError, match="has location tokens and 2 text encoders; expected one"):
        load_model(path, device="cpu", classes=CLASSES)


def test_bad_conditions(geo_model) -> None:
    x_t = torch.zeros(1, *geo_model.latent_shape)
    with pytest.raises(ModelError, match="the embeddings of 15 tokens, expected"):
        geo_model.predict(x_t, torch.tensor([3]), torch.zeros(1, 12))
    with pytest.raises(DiveFastError, match="may have 5 objects"):
        geo_model.prompt(Layout(BOXES[:1].repeat(6, 1), torch.zeros(6, dtype=torch.int64)))
