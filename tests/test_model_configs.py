"""Values of a model's JSON files that are none: one sentence each, before memory is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import read_json, write_json
from tiny_layout import FORMAT
from tiny_prior import make_prior
from weight_files import changed, copied

from dive_fast import DiffusionClassifier, LayoutDetector, ModelError
from dive_fast.core.config import Config
from dive_fast.models import load_model

CLASSES = ["cat", "dog"]
HUGE = 10**300


# -- the reader ------------------------------------------------------------------------------------


def config(**content: Any) -> Config:
    return Config("x.json", content)


def test_values_that_are_read():
    read = config(a=1, b=0.5, c="t", d=False, e=[1, 2], f=None, h=[0.5, 1])
    assert read.number("a") == 1.0 and isinstance(read.number("a"), float)
    assert (read.number("b", above=0), read.whole("a", at_least=1)) == (0.5, 1)
    assert (read.text("c"), read.one_of("c", ("s", "t")), read.flag("d")) == ("t", "t", False)
    assert (read.whole_list("e", length=2), read.numbers("h")) == ((1, 2), (0.5, 1.0))
    # Missing and null are the default, whatever that is.
    assert [read.whole(key, None) for key in "fz"] == [None, None]
    assert [read.flag(key, True) for key in "fz"] == [True, True]


@pytest.mark.parametrize(
    ("method", "value", "options", "message"),
    [
        ("number", "7", {}, "k in x.json must be a finite number, got '7'."),
        ("number", True, {}, "a finite number, got True."),
        ("number", float("nan"), {}, "a finite number, got nan."),
        ("number", float("-inf"), {}, "a finite number, got -inf."),
        ("number", 1e300, {}, "a finite number, got 1e+300."),
        ("number", HUGE, {}, "a finite number, got 100000000000000"),
        ("number", 0, {"above": 0}, "a finite number above 0, got 0."),
        ("number", 2, {"at_least": 0, "at_most": 1}, "a finite number from 0 to 1, got 2."),
        ("number", None, {}, "a finite number, got None."),
        ("whole", 1.0, {}, "a whole number, got 1.0."),
        ("whole", False, {"at_least": 0}, "a whole number of at least 0, got False."),
        ("whole", HUGE, {"at_least": 1}, "a whole number from 1 to 2147483647, got 1000"),
        ("whole", [1], {}, "a whole number, got [1]."),
        ("text", 7, {}, "a text, got 7."),
        ("text", ["a"], {}, "a text, got ['a']."),
        ("one_of", ["a"], {"allowed": ("a", "b")}, "one of a, b, got ['a']."),
        ("one_of", "c", {"allowed": ("a", "b")}, "one of a, b, got 'c'."),
        ("flag", 1, {}, "true or false, got 1."),
        ("numbers", [1, "2"], {}, "a list of finite numbers, got [1, '2']."),
        ("numbers", 1, {}, "a list of finite numbers, got 1."),
        ("whole_list", [1], {"length": 2}, "a list of 2 whole numbers, got [1]."),
        ("whole_list", [0], {"at_least": 1}, "a list of whole numbers each at least 1, got [0]."),
    ],
)
def test_values_that_are_refused(method, value, options, message):
    with pytest.raises(ModelError) as raised:
        getattr(config(k=value), method)("k", **options)
    said = str(raised.value)
    assert message in said and said.endswith(".") and len(said) < 200


def test_what_is_not_stated():
    with pytest.raises(ModelError, match="^k in x.json must be a text, got none.$"):
        config().text("k")
    with pytest.raises(ModelError, match=r"^x.json must be a JSON object, got \[1\].$"):
        Config("x.json", [1])


# -- JSON itself -----------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_error(latent_dit_dir, tmp_path):
    directory = copied(latent_dit_dir, tmp_path / "model")
    (directory / "dive_fast.json").write_text('{"beta": 2.5}')
    for path in directory.rglob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    model = load_model(directory)
    assert model.inverse_temperature == 2.5
    assert model.identity() == load_model(latent_dit_dir).identity()


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "dive_fast.json"])
def test_an_entry_that_stands_there_twice(file, dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    (directory / "dive_fast.json").write_text("{}")
    path = directory / file
    content = path.read_text().strip().removesuffix("}").rstrip()
    comma = "" if content == "{" else ","
    path.write_text(content + comma + '"beta": 1, "beta": 2}')
    with pytest.raises(ModelError, match=f"{file} states 'beta' twice"):
        load_model(directory)


def test_a_number_of_more_digits_than_python_reads(dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    (directory / "dive_fast.json").write_text('{"beta": ' + "9" * 5000 + "}")
    with pytest.raises(ModelError, match="dive_fast.json cannot be read as JSON"):
        load_model(directory)


# -- what a model's files state --------------------------------------------------------------------

NO_PART = [7, "7", {}, [], ["diffusers"], ["diffusers", 7], ["diffusers", None], [["a"], ["b"]]]


@pytest.mark.parametrize("entry", NO_PART, ids=str)
def test_parts_in_the_index(entry, latent_dit_dir, layout_dir, tmp_path):
    for n, source in enumerate((latent_dit_dir, layout_dir)):
        directory = changed(source, tmp_path / str(n), "model_index.json", vae=entry)
        with pytest.raises(
            ModelError, match=r"expected vae in .* to be \[library, class\] or null"
        ):
            load_model(directory)


def test_parts_that_are_not_there(dit_dir, layout_dir, tmp_path):
    for n, entry in enumerate((None, [None, None])):
        for source in (dit_dir, layout_dir):
            target = tmp_path / f"{source.name}{n}"
            assert load_model(changed(source, target, "model_index.json", vae=entry)).vae is None


VAE = [
    ({"scaling_factor": "0.1"}, "scaling_factor in .* must be a number, got '0.1'"),
    ({"scaling_factor": 0}, "scaling_factor of the VAE must be a number above 0, got 0"),
    ({"scaling_factor": -1}, "scaling_factor of the VAE must be a number above 0, got -1"),
    ({"scaling_factor": None}, "scaling_factor of the VAE must be a number above 0, got None"),
    ({"scaling_factor": float("nan")}, "scaling_factor in .* must be a number, got nan"),
    ({"scaling_factor": HUGE}, "scaling_factor in .* must be a number, got 1000"),
    ({"shift_factor": True}, "shift_factor in .* must be a number, got True"),
    ({"shift_factor": float("inf")}, "shift_factor in .* must be a number, got inf"),
    ({"shift_factor": [1]}, r"shift_factor in .* must be a number, got \[1\]"),
    ({"block_out_channels": [8] * 10**5}, "block_out_channels .* at most 256 entries, got 100000"),
    ({"block_out_channels": [8, "8"]}, "block_out_channels in .* must be a whole number, got '8'"),
    ({"block_out_channels": 8}, "block_out_channels in .* must be a list, got 8"),
    ({"norm_num_groups": 3}, "cannot be loaded as AutoencoderKL"),
    ({"norm_num_groups": 0}, "norm_num_groups in .* must be from 1 to"),
    ({"act_fn": ["silu"]}, "act_fn in .* must be a text, got"),
    ({"act_fn": "none of them"}, "cannot be loaded as AutoencoderKL"),
    ({"down_block_types": ["x", "y"]}, "cannot be loaded as AutoencoderKL"),
    ({"use_quant_conv": "yes"}, "use_quant_conv in .* must be true or false, got 'yes'"),
    ({"layers_per_block": 10**6}, "makes far more than the .* weights that are there"),
]


@pytest.mark.parametrize(("values", "message"), VAE, ids=[next(iter(v[0])) for v in VAE])
def test_the_autoencoder(values, message, latent_dit_dir, tmp_path):
    directory = changed(latent_dit_dir, tmp_path / "model", "vae/config.json", **values)
    with pytest.raises(ModelError, match=message):
        load_model(directory)


DIT = [
    ({"num_layers": 10**6}, "do not fit its config.json: it makes far more than the .* weights"),
    ({"num_layers": HUGE}, "num_layers in .* must be a whole number, got 1000"),
    ({"sample_size": 10**5}, "sample_size in .* must be from 1 to 4096, got 100000"),
    ({"sample_size": 4096, "patch_size": 1}, "size mismatch|tables of"),
    ({"patch_size": 10**5}, "patch_size in .* must be from 1 to 4096"),
    ({"num_embeds_ada_norm": 10**9}, "size mismatch for .*embedding_table"),
    ({"num_attention_heads": 10**8}, "size mismatch|cannot be loaded"),
    ({"norm_eps": "x"}, "norm_eps in .* must be a number, got 'x'"),
    ({"norm_eps": float("nan")}, "norm_eps in .* must be a number, got nan"),
    ({"norm_eps": 1e30}, "norm_eps in .* must be from 0 to 0.1, got 1e"),
    ({"attention_bias": "false"}, "attention_bias in .* must be true or false, got 'false'"),
    ({"activation_fn": 7}, "activation_fn in .* must be a text, got 7"),
    ({"out_channels": [1]}, r"out_channels in .* must be a whole number, got \[1\]"),
]


@pytest.mark.parametrize(("values", "message"), DIT, ids=[next(iter(v[0])) for v in DIT])
def test_the_transformer(values, message, dit_dir, tmp_path):
    directory = changed(dit_dir, tmp_path / "model", "transformer/config.json", **values)
    with pytest.raises(ModelError, match=message):
        load_model(directory)


SHORTLIST = {
    "slope": 1,
    "curvature": [0.0] * 4,
    "error": 0.1,
    "control": 0.5,
    "classes": "x",
    "checks": [],
}
SIDECAR = [
    ({"beta": HUGE}, "beta in .*dive_fast.json must be above 0 and below 3e38, got 1000"),
    ({"beta": float("nan")}, "beta in .*dive_fast.json must be above 0"),
    ({"beta": "7"}, "beta in .*dive_fast.json must be above 0 .*, got '7'"),
    ({"timestep_embedding": 7}, "timestep_embedding in .*dive_fast.json must be a text, got 7"),
    ({"timestep_embedding": ["original"]}, "timestep_embedding in .* must be a text"),
    ({"timestep_embedding": ""}, "expected a timestep_embedding of .*, got ''"),
    (
        {"timesteps": {"n_timesteps": HUGE, "density": [1], "weights": [1]}},
        "timesteps in .* cannot be used: n_timesteps must be a whole number .*, got 1000",
    ),
    (
        {"timesteps": {"n_timesteps": 1000, "density": [1e308, 1e308], "weights": [1, 1]}},
        "timesteps in .* cannot be used: density must be a list of finite numbers",
    ),
    (
        {"shortlist": {**SHORTLIST, "curvature": [1e300] * 4}},
        "shortlist in .* cannot be used: .* finite curvature for every class",
    ),
    (
        {"shortlist": {**SHORTLIST, "classes": 7}},
        "shortlist in .* cannot be used: .* digest of its classes, got 7",
    ),
]


@pytest.mark.parametrize(("values", "message"), SIDECAR, ids=[str(v[0])[:30] for v in SIDECAR])
def test_fitted_values(values, message, dit_dir, tmp_path):
    directory = changed(dit_dir, tmp_path / "model", "dive_fast.json", **values)
    with pytest.raises(ModelError, match=message):
        load_model(directory)


TEXT = "text_encoder/config.json"
TOKENIZER = "tokenizer/tokenizer_config.json"
PROMPTED = [
    (TOKENIZER, {"model_max_length": 0}, "model_max_length in .* of at least 3, got 0"),
    (TOKENIZER, {"model_max_length": -1}, "model_max_length in .* of at least 3, got -1"),
    (TOKENIZER, {"model_max_length": "77"}, "model_max_length in .* must be .*, got '77'"),
    (TOKENIZER, {"model_max_length": True}, "model_max_length in .* must be .*, got True"),
    (TOKENIZER, {"model_max_length": float("nan")}, "model_max_length in .* must be .*, got nan"),
    (TOKENIZER, {"pad_token": 7}, "pad_token in .* must be a text, got 7"),
    (TOKENIZER, {"eos_token": {"content": 7}}, "content in eos_token in .* must be a text, got 7"),
    (TEXT, {"num_hidden_layers": 10**6}, "text_encoder do not fit .* it makes far more than"),
    (TEXT, {"hidden_size": 10**6}, "size mismatch for .*: .*expected"),
    (TEXT, {"vocab_size": 10**9}, "size mismatch for .*token_embedding.weight"),
    (TEXT, {"max_position_embeddings": 10**9}, "size mismatch for .*position_embedding.weight"),
    (TEXT, {"max_position_embeddings": "77"}, "max_position_embeddings in .* must be a whole"),
    (TEXT, {"num_attention_heads": 5}, "cannot be loaded as CLIPTextModel: .*multiple|divisible"),
    (TEXT, {"num_attention_heads": 0}, "num_attention_heads in .* whole number of at least 1"),
    (TEXT, {"layer_norm_eps": None}, "layer_norm_eps in .* must be stated, got null"),
    (TEXT, {"hidden_act": "none"}, "cannot be loaded as CLIPTextModel: .*none"),
    (TEXT, {"model_type": ["clip_text_model"]}, "expected the model_type clip_text_model, got"),
    ("unet/config.json", {"freq_shift": "x"}, "freq_shift in .* must be a whole number, got 'x'"),
    ("unet/config.json", {"sample_size": [8, "8"]}, "sample_size in .* a whole number, got '8'"),
    ("unet/config.json", {"downsample_padding": 10**6}, "downsample_padding in .* from 0 to 16"),
    (
        "unet/config.json",
        {"transformer_layers_per_block": 10**6},
        "unet do not fit its config.json: it makes far more",
    ),
    (
        "model_index.json",
        {"force_zeros_for_empty_prompt": "false"},
        "force_zeros_for_empty_prompt in .* must be true or false, got 'false'",
    ),
    ("model_index.json", {"unet": ["diffusers", ["UNet2DConditionModel"]]}, "expected unet in"),
]


@pytest.mark.parametrize(
    ("file", "values", "message"), PROMPTED, ids=[f"{next(iter(v[1]))}" for v in PROMPTED]
)
def test_stable_diffusion(file, values, message, sd, tmp_path):
    directory = changed(sd, tmp_path / "model", file, **values)
    with pytest.raises(ModelError, match=message):
        load_model(directory, classes=CLASSES)


def test_a_tokenizer_without_a_limit(sd, tmp_path):
    """transformers writes 1e30 for none: the encoder's positions are the limit."""
    directory = changed(sd, tmp_path / "model", TOKENIZER, model_max_length=int(1e30))
    (tower,) = load_model(directory, classes=CLASSES).text.towers
    assert tower.length == tower.encoder.config.max_position_embeddings == 16


ENCODER = "layout_encoder/config.json"


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"space_to_depth": True}, "space_to_depth must be a number of at le"),
        ("model_index.json", {"space_to_depth": HUGE}, "space_to_depth must be a number of at le"),
        (ENCODER, {"n_slots": 10**9}, "size mismatch for position_embedding.weight"),
        (ENCODER, {"layers": 10**6}, "layers in .* must be from 1 to 1024, got 1000000"),
        (ENCODER, {"layers": 1000}, "it makes far more than the .* weights|missing keys"),
        (ENCODER, {"heads": 0}, "cannot be loaded as LayoutEncoder|cannot be computed"),
        (ENCODER, {"layout": 7}, "layout in .* must be an object, got 7"),
        (ENCODER, {"layout": FORMAT.to_dict() | {"grid": HUGE}}, "grid must be from 0 to"),
        (ENCODER, {"layout": FORMAT.to_dict() | {"names": [["a"]]}}, "names must be strings"),
    ],
)
def test_layouts(file, values, message, layout_dir, tmp_path):
    directory = changed(layout_dir, tmp_path / "model", file, **values)
    with pytest.raises(ModelError, match=message):
        load_model(directory)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 10**6}, "layers in .* must be from 1 to 1024"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps in .* must be from 1 to 1000000"),
        ({"width": 10**7}, "size mismatch|cannot be loaded as LayoutPrior"),
        ({"heads": 0}, "cannot be loaded as LayoutPrior"),
        ({"scale": HUGE}, "expected a positive scale in .*config.json, got 1000"),
        ({"layout": "7"}, "layout in .* must be an object"),
        ({"table": 7}, "table in .* must be a text"),
    ],
)
def test_priors(values, message, layout_dir, tmp_path):
    directory = copied(layout_dir, tmp_path / "model")
    make_prior().save_pretrained(directory / "prior")
    path = directory / "prior" / "config.json"
    write_json(path, read_json(path) | values)
    with pytest.raises(ModelError, match=message):
        LayoutDetector.from_pretrained(directory)


# -- what fails when it is first used --------------------------------------------------------------


@pytest.mark.parametrize("cache", ["off", "exact"])
def test_a_network_that_cannot_run(cache, dit_dir):
    """Its forward raises what torch raises of shapes; the sentence names the model."""
    classifier = DiffusionClassifier.from_pretrained(dit_dir, device="cpu", cache=cache)
    classifier.model.transformer.proj_out_2 = torch.nn.Linear(3, 4)
    message = "the model .*dit cannot be computed, as if its configuration were another's: mat1 and"
    with pytest.raises(ModelError, match=message):
        classifier(latents=torch.zeros(1, 1, 8, 8), strategy="enumerate", probes=1)


def test_an_autoencoder_that_cannot_run(latent_dit_dir):
    classifier = DiffusionClassifier.from_pretrained(latent_dit_dir, device="cpu")
    classifier.model.vae.quant_conv = torch.nn.Conv2d(3, 4, 1)
    with pytest.raises(ModelError, match="the model .*latent-dit cannot be computed, as if"):
        classifier(torch.zeros(1, 3, 8, 8), strategy="enumerate", probes=1)


def test_patches_that_do_not_fill_the_latents(dit_dir, tmp_path):
    directory = changed(dit_dir, tmp_path / "model", "transformer/config.json", sample_size=9)
    with pytest.raises(ModelError, match="sample_size of the transformer .* patch_size 2 divides"):
        load_model(directory)


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "~nobody-of-this-name/model"])
def test_names_that_no_file_can_have(source):
    with pytest.raises(ModelError, match="cannot be a directory: .*|unknown model '"):
        load_model(source)
