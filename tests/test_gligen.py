"""GLIGEN as layout-to-image model: exactness, gradients, detection, directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command import assert_refused, call
from diffusers import UNet2DConditionModel
from pictures import noise_picture
from PIL import Image
from tiny_gligen import make_pipeline, write_gligen
from tiny_sd import make_unet, write_sd

from dive_fast import LayoutDetector
from dive_fast.core.layouts import Layout
from dive_fast.engine import EngineOptions
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models import load_model, resolve
from dive_fast.models.gligen import Gligen, StagedGligen
from dive_fast.models.protocol import StagedModel
from dive_fast.models.unet import stages

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # the same fp32 operations in another grouping
CLASSES = ("cat", "a dog", "fox")
BOXES = torch.tensor([[0.0, 0.25, 0.5, 1.0], [0.5, 0.0, 1.0, 0.5]])
IDS = torch.tensor([2, 0])
FAST = {"probes": 2, "step_probes": 2, "final_probes": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_gligen(tmp_path_factory.mktemp("gligen"))


@pytest.fixture(scope="module")
def gligen(directory) -> StagedGligen:
    return load_model(directory, classes=CLASSES)


def conditions(model, order=(0, 1)) -> torch.Tensor:
    """Of none, one and two objects."""
    order = torch.tensor(order)
    layouts = [Layout(BOXES[order[:n]], IDS[order[:n]]) for n in range(3)]
    return model.embed(torch.stack([model.layout_format.encode(layout) for layout in layouts]))


def noisy(model, m: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(m, *model.latent_shape, generator=generator)
    return x_t, torch.randint(1000, (m,), generator=generator)


def in_parts(model, x_t, t, condition) -> torch.Tensor:
    projected = model.project(condition)
    return model.decoder(model.encoder(model.prefix(x_t, t), projected), projected)


def as_the_pipeline(pipeline, phrases: list[str], boxes: list[list[float]]) -> dict:
    """``cross_attention_kwargs`` as its ``__call__`` makes them."""
    boxes_, masks = torch.zeros(1, 30, 4), torch.zeros(1, 30)
    embeddings = torch.zeros(1, 30, pipeline.unet.config.cross_attention_dim)
    if phrases:
        tokens = pipeline.tokenizer(phrases, padding=True, return_tensors="pt")
        boxes_[0, : len(boxes)] = torch.tensor(boxes)
        embeddings[0, : len(boxes)] = pipeline.text_encoder(**tokens).pooler_output
        masks[0, : len(boxes)] = 1
    return {"gligen": {"boxes": boxes_, "positive_embeddings": embeddings, "masks": masks}}


@pytest.mark.parametrize("max_objects", [2, 30])
def test_predicts_what_the_pipeline_s_network_predicts(directory, tmp_path, max_objects):
    pipeline = make_pipeline(tmp_path)  # the same seed as the directory
    model = load_model(directory, classes=CLASSES)
    model.set_layout(max_objects=max_objects)
    condition, (x_t, t) = conditions(model), noisy(model)
    with torch.no_grad():
        caption, _ = pipeline.encode_prompt("", "cpu", 1, False)
        whole = model.predict(x_t, t, condition)
        staged = in_parts(model, x_t, t, condition)
        for n in range(3):
            phrases = [CLASSES[c] for c in IDS[:n]]
            expected = pipeline.unet(
                x_t[n : n + 1],
                t[n : n + 1],
                encoder_hidden_states=caption,
                cross_attention_kwargs=as_the_pipeline(pipeline, phrases, BOXES[:n].tolist()),
            ).sample
            torch.testing.assert_close(whole[n : n + 1], expected, **ROUNDING)
            torch.testing.assert_close(staged[n : n + 1], expected, **ROUNDING)
        same = model.predict(x_t[:1].expand(3, -1, -1, -1), t[:1].expand(3), condition)
    assert (same[0] - same[1]).abs().max() > 0.01 < (same[1] - same[2]).abs().max()


def test_the_order_of_objects_does_not_matter(gligen):
    x_t, t = noisy(gligen)
    one, other = (gligen.predict(x_t, t, conditions(gligen, order)) for order in ((0, 1), (1, 0)))
    assert (one[1] - other[1]).abs().max() > 0.01  # of one object: another one
    torch.testing.assert_close(one[2], other[2], **ROUNDING)


def test_tokens_and_what_they_mean(gligen):
    table, form = gligen.vocabulary.table, gligen.layout_format
    assert form.names == CLASSES and (form.grid, form.max_objects) == (33, 30)
    assert table.shape == (3 + 33 * 33 + 1, 5) and gligen.vocabulary.names[3] == "(0, 0)"
    assert gligen.latent_shape == (4, 8, 8) and gligen.image_shape == (3, 16, 16)
    given = gligen.grounding(conditions(gligen))
    assert given["boxes"].shape == (3, 30, 4)
    torch.testing.assert_close(given["boxes"][2, :2], BOXES)
    assert given["masks"].sum(dim=1).tolist() == [0, 1, 2]
    assert torch.equal(given["positive_embeddings"][2, :2], gligen.phrases[IDS])
    # The mean of the classes' rows, with which boxes are proposed, is an object of the mean phrase.
    mean = conditions(gligen)[1:2].clone()
    mean[0, :5] = table[:3].mean(dim=0)
    given = gligen.grounding(mean)
    torch.testing.assert_close(given["masks"][0, 0], torch.tensor(1.0))
    torch.testing.assert_close(given["positive_embeddings"][0, 0], gligen.phrases.mean(dim=0))


def test_gradient_of_the_whole_path(directory):
    """dL/d(embedding) against central differences in float64: corners, classes, presence."""
    model = load_model(directory, classes=CLASSES)
    model.set_layout(max_objects=2)
    model.to("cpu", torch.float64)
    (x_t, t), condition = noisy(model), conditions(model).double()
    x_t = x_t.double()
    noise = torch.randn(x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(c: torch.Tensor, predict=model.predict) -> torch.Tensor:
        return F.mse_loss(predict(x_t, t, c), noise)

    def staged(*arguments) -> torch.Tensor:
        return in_parts(model, *arguments)

    condition.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(condition), condition)
    (in_stages,) = torch.autograd.grad(loss(condition, staged), condition)
    torch.testing.assert_close(gradient, in_stages, rtol=1e-9, atol=1e-14)
    step = 1e-5
    # Row, then coordinate: three of class, x, y; of class, top-left and bottom-right.
    places = {"class": (1, 2), "another class": (1, 0), "left": (1, 8), "top": (2, 9)}
    places |= {"right": (2, 13), "bottom": (2, 14), "an absent object": (1, 15)}
    with torch.no_grad():
        for what, (i, j) in places.items():
            d = torch.zeros_like(condition)
            d[i, j] = 1
            difference = (loss(condition + step * d) - loss(condition - step * d)) / (2 * step)
            assert difference.abs() > 1e-7, what
            torch.testing.assert_close(gradient[i, j], difference, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("cache", ["off", "exact"])
@pytest.mark.parametrize("strategy", ["guided", "invert"])
def test_detects(directory, strategy, cache):
    """Untrained, so that what is found means nothing, but it is a layout of the grid."""
    model = load_model(directory, classes=CLASSES)
    model.set_layout(grid=9, max_objects=3)
    model.inverse_temperature = 1.0
    detector = LayoutDetector(model, options=EngineOptions(cache=cache))
    image = noise_picture((32, 16), 90)
    # Without a margin and without settling objects are kept that barely help.
    settings = {"guided": {"margin": 0.0}, "invert": {"steps": 4, "margin": 0.0}}
    (found,) = detector(image, strategy=strategy, seed=1, **FAST, **settings[strategy])
    assert found.names == CLASSES and len(found) > 0
    steps = found.xyxy / torch.tensor([32, 16, 32, 16]) * 8
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert (found.xyxy[:, 2:] > found.xyxy[:, :2]).all()
    assert ((found.confidence > 0) & (found.confidence <= 1)).all()
    record = detector.last_run
    assert record.evaluations > 0 and (record.cache_hits > 0) == (cache == "exact")


def test_half_precision(directory):
    model = load_model(directory, classes=CLASSES, dtype="bfloat16")
    assert isinstance(model, StagedModel)
    (x_t, t), condition = noisy(model), conditions(model)
    assert model.predict(x_t, t, condition).dtype == torch.bfloat16
    assert in_parts(model, x_t, t, condition).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.unet.parameters())


def test_gates_that_a_sampler_left_off(directory, tmp_path):
    model = load_model(directory, classes=CLASSES)
    pipeline = make_pipeline(tmp_path)
    pipeline.enable_fuser(False)
    again = StagedGligen(pipeline.unet, model.vae, model.schedule, model.text, model.classes)
    (x_t, t), condition = noisy(model), conditions(model)
    torch.testing.assert_close(
        again.predict(x_t, t, condition), model.predict(x_t, t, condition), **ROUNDING
    )


def test_a_network_that_cannot_be_cut_runs_whole(tmp_path):
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = load_model(write_gligen(tmp_path, **blocks), classes=CLASSES)
    assert type(model) is Gligen and not isinstance(model, StagedModel)
    condition = conditions(model).requires_grad_()
    model.predict(*noisy(model), condition).sum().backward()
    assert condition.grad[1, [2, 8, 9]].abs().min() > 0
    model.set_layout(grid=5, max_objects=2)
    LayoutDetector(model)(Image.new("L", (16, 16)), **FAST)


def test_the_published_network_can_be_cut():
    """Its configuration, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, attention_type="gated"
        )
        assert stages.can_be_cut(unet) and unet.position_net.positive_len == 768
        grounded = stages.grounding(unet, torch.empty(2, 30, 768))
    assert [x.shape[2] for x in grounded] == [320] * 2 + [640] * 2 + [1280] * 3 + (
        [1280] * 3 + [640] * 3 + [320] * 3
    )


def test_phrases(directory):
    plain = load_model(directory, classes=CLASSES)
    assert plain.classes.prompts == (("cat",), ("a dog",), ("fox",))
    other = load_model(directory, classes={"cat": ["cat", "a cat"], "dog": "dog"})
    a, b = (plain.text.pooled_states([text], plain.device)[0] for text in ("cat", "a cat"))
    torch.testing.assert_close(other.phrases[0], (a + b) / 2, **ROUNDING)
    other.set_classes(["fox"], templates=["a {}", "{}"])
    assert other.layout_format.names == ("fox",) and other.vocabulary.dim == 3
    other.set_classes(["fox"])
    assert other.classes.prompts == (("fox",),)
    assert other.grounding(torch.zeros(1, 90 * 3))["masks"].sum() == 0
    assert other.identity() != plain.identity()


def change_extra(directory: Path, tmp_path: Path, content: dict) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "dive_fast.json").write_text(json.dumps(content))
    return copy


def test_what_a_directory_states(directory, gligen, tmp_path):
    stated = {"classes": ["cat", "fox"], "templates": ["a {}"], "caption": "a photo"}
    copy = change_extra(directory, tmp_path, stated | {"grid": 17, "max_objects": 4})
    assert not resolve(copy).needs_classes and resolve(directory).needs_classes
    other = load_model(copy)
    assert other.classes.prompts == (("a cat",), ("a fox",))
    assert (other.layout_format.grid, other.layout_format.max_objects) == (17, 4)
    x_t, t = noisy(gligen, 1)
    absent = [torch.zeros(1, m.layout_format.n_slots * m.vocabulary.dim) for m in (gligen, other)]
    without, with_caption = gligen.predict(x_t, t, absent[0]), other.predict(x_t, t, absent[1])
    assert (without - with_caption).abs().max() > 0.01
    torch.testing.assert_close(in_parts(other, x_t, t, absent[1]), with_caption, **ROUNDING)


def test_an_index_that_says_stable_diffusion(directory, tmp_path):
    """As the published one does; the UNet's configuration says what it is."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipeline"
    (copy / "model_index.json").write_text(json.dumps(index))
    assert isinstance(load_model(copy, classes=CLASSES), Gligen)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"grid": 1}, "grid must be a number of at least 2, got 1"),
        ({"grid": "9"}, "grid must be a number of at least 2, got '9'"),
        ({"max_objects": 0}, "max_objects must be a number of at least 1, got 0"),
        ({"max_objects": 31}, "max_objects of at most 30, with which GLIGEN was trained, got 31"),
        ({"caption": ["a"]}, "expected a text as caption in"),
    ],
)
def test_bad_statements(directory, tmp_path, stated, message):
    with pytest.raises(ModelError, match=message):
        load_model(change_extra(directory, tmp_path, stated), classes=CLASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "is a text-conditional model and needs classes"),
        ({"classes": []}, "classes must hold at least one text"),
        ({"classes": ["cat", ""]}, "classes must hold texts that are not empty, got ''"),
        ({"classes": ["cat", "Cat"]}, "have the same prompts as the text encoder reads them"),
        ({"classes": ["cat"], "average": "loss"}, "expected average='embedding' for a layout"),
        ({"classes": ["cat"], "templates": ["a"]}, "a template needs {}"),
        ({"classes": ["cat"], "timestep_embedding": "original"}, "for models of the family dit"),
    ],
)
def test_bad_options(directory, options, message):
    with pytest.raises(ModelError, match=message):
        load_model(directory, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "gated-text-image"}, "also takes an image of every object"),
        ({"attention_type": "default"}, "expected a unet with a position_net .* got .*'default'"),
        ({"in_channels": 9}, r"paints into images \(9 channels\), expected .* \(4 channels\)"),
        ({"in_channels": 5}, "expected 5 or 10 output channels .* got 4"),
        (
            {"cross_attention_dim": 14},
            "position_net .* takes phrases of 14 values, but .* gives 12",
        ),
        ({"sample_size": None}, "to state one sample_size for both sides"),
    ],
)
def test_networks_that_do_not_fit(directory, tmp_path, changes, message):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    make_unet(12, **({"attention_type": "gated"} | changes)).save_pretrained(copy / "unet")
    with pytest.raises(ModelError, match=message):
        load_model(copy, classes=CLASSES)


def test_more_objects_than_slots(directory):
    model = load_model(directory, classes=CLASSES)
    model.set_layout(max_objects=1)
    with pytest.raises(DiveFastError, match="a layout may have 1 objects, but got 2"):
        conditions(model)
    with pytest.raises(ModelError, match=r"of 3 tokens, expected \[N, 15\], got \[2, 7\]"):
        model.predict(*noisy(model, 2), torch.zeros(2, 7))
    with pytest.raises(ModelError, match=r"tokens in \[0, 1093\), got 0 to 1093"):
        model.embed(torch.tensor([[0, 3, 1093]]))


def test_plain_stable_diffusion_is_no_detector(tmp_path):
    with pytest.raises(ModelError, match="which has no layout"):
        LayoutDetector.from_pretrained(write_sd(tmp_path), classes=["cat", "dog"])


def test_command_line(directory, tmp_path, capsys):
    small = change_extra(directory, tmp_path, {"grid": 5, "max_objects": 2})
    picture = tmp_path / "a.png"
    noise_picture((16, 16), 90).save(picture)
    fast = (
        "--probes",
        2,
        "--set",
        "step_probes=2",
        "--set",
        "final_probes=2",
        "--set",
        "rough_probes=2",
    )
    arguments = ("detect", picture, "--model", small, *fast)
    out = tmp_path / "run"
    said = call(
        capsys, *arguments, "--out", out, "--classes", "cat,fox", "--template", "a {}", "--json"
    )
    assert said.code == 0 and "labels" in json.loads(said.out)[0]
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["model"]["prompts"] == {"cat": ["a cat"], "fox": ["a fox"]}
    assert_refused(call(capsys, *arguments, "--out", tmp_path / "b"), "needs classes")


def test_evaluate_asks_about_the_categories(directory, tmp_path, capsys):
    pytest.importorskip("pycocotools")
    small = change_extra(directory, tmp_path, {"grid": 5, "max_objects": 2})
    noise_picture((16, 16), 90).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 16}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 8, 8]}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "fox"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    said = call(
        capsys, "evaluate", "--data", tmp_path / "boxes.json", "--images", tmp_path, "--model",
        small, "--out", tmp_path / "run", "--probes", 2, "--set", "rough_probes=2", "--json",
    )  # fmt: skip
    assert said.code == 0 and "AP50" in json.loads(said.out)
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert list(config["model"]["prompts"]) == ["cat", "fox"]
