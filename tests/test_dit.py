"""The family "dit" on small models of the real classes, saved and loaded back."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from tiny import make_vae
from tiny_transformer import CHANNELS, N_CLASSES, SIZE, make_transformer

from dive_fast import DiffusionClassifier, DiveFastError, ModelError
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.data.digits import load_digits
from dive_fast.models.dit.model import DiT, choose_timestep_embedding, embedders_are_equal
from dive_fast.predict.timestep_embedding import timestep_embedding_losses
from dive_fast.training.zoo import write_model

SCHEDULE = Schedule.from_betas(make_betas("linear", 1000))
NAMES = tuple("abcde")
# The same fp32 operations on memory laid out otherwise.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def inputs(m: int = 6):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(m, CHANNELS, SIZE, SIZE, generator=generator)
    return x_t, torch.arange(m) * 150 + 7, torch.arange(m) % N_CLASSES


@pytest.mark.parametrize("learned_sigma", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_row_of_the_table_is_the_label(tied, learned_sigma):
    original = make_transformer(tied=tied, learned_sigma=learned_sigma)
    x_t, t, labels = inputs()
    expected = original(x_t, timestep=t, class_labels=labels).sample
    assert embedders_are_equal(original) is tied
    model = DiT(original, None, SCHEDULE, NAMES, tied=tied)
    assert model.vocabulary.dim == (16 if tied else 2 * 16)
    found = model.predict(x_t, t, model.vocabulary.table[labels])
    torch.testing.assert_close(found, expected, **ROUNDING)
    # The unconditional row is what diffusers drops labels to.
    original = make_transformer(tied=tied, learned_sigma=learned_sigma)
    dropped = original(x_t, timestep=t, class_labels=torch.full((6,), N_CLASSES)).sample
    found = model.predict(x_t, t, model.vocabulary.unconditional.expand(6, -1))
    torch.testing.assert_close(found, dropped, **ROUNDING)


def test_the_class_vector_enters_every_block_and_the_final_layer():
    """Taking it from any one of those places must change the output."""
    x_t, t, labels = inputs()
    model = DiT(make_transformer(tied=False), None, SCHEDULE, NAMES, tied=False)
    condition = model.vocabulary.table[labels]
    whole = model.predict(x_t, t, condition)
    for copy in range(2):
        without = condition.view(6, 2, 16).clone()
        without[:, copy] = 0
        assert not torch.allclose(model.predict(x_t, t, without.flatten(1)), whole, atol=1e-3)


def test_the_gradient_of_the_condition_is_right():
    model = DiT(make_transformer().double(), None, SCHEDULE, NAMES)
    x_t, t, labels = inputs(2)
    condition = model.vocabulary.table[labels[:2]].double().requires_grad_()
    predict = lambda v: model.predict(x_t.double(), t, v)  # noqa: E731
    # The frequencies are float32 in diffusers too; they do not depend on the condition.
    assert torch.autograd.gradcheck(predict, condition)
    assert not any(p.requires_grad for p in model.transformer.parameters())


def test_the_two_timestep_embeddings_are_diffusers_and_the_original():
    x_t, t, labels = inputs()
    outputs = {}
    for convention, shift in (("diffusers", 1), ("original", 0)):
        model = DiT(make_transformer(), None, SCHEDULE, NAMES, timestep_embedding=convention)
        condition = model.vocabulary.table[labels]
        outputs[convention] = model.predict(x_t, t, condition)
        # Independently: the equation of the original code, [cos, sin] of t f_i.
        f = torch.exp(-math.log(10000) * torch.arange(128) / (128 - shift))
        angles = t[:, None].float() * f[None]
        by_hand = torch.cat([angles.cos(), angles.sin()], dim=1)
        theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
        torch.testing.assert_close(theirs, by_hand, rtol=0, atol=2e-4)
    assert not torch.allclose(outputs["diffusers"], outputs["original"], atol=1e-2)


def test_the_convention_of_training_has_the_lower_loss():
    """The zoo's digits learned with diffusers' frequencies; taught the original ones, they change.

    The margin is about one percent, on the same images and probes.
    """
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    classifier = DiffusionClassifier.from_pretrained("digits")
    held_out, train = load_digits("test"), load_digits("train")
    arguments = {"images": held_out.images[:60], "labels": held_out.labels[:60], "probes": 20}
    found = timestep_embedding_losses(classifier, **arguments)
    assert found["diffusers"] < found["original"]
    assert classifier.model.timestep_embedding == "diffusers"

    model = classifier.model
    model.timestep_embedding = "original"
    parameters = [*model.transformer.parameters(), *model.timestep_embedders.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    x0, labels = classifier.encode(train.images), torch.from_numpy(train.labels)
    optimizer = torch.optim.Adam(parameters, lr=3e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        pick = torch.randint(len(x0), (64,), generator=generator)
        t = torch.randint(1000, (64,), generator=generator)
        eps = torch.randn(64, 1, 8, 8, generator=generator)
        a, s = (f[t].view(-1, 1, 1, 1) for f in (model.schedule.a, model.schedule.s))
        condition = model.vocabulary.table[labels[pick]]
        prediction = model.predict(a * x0[pick] + s * eps, t, condition)
        optimizer.zero_grad()
        (prediction - eps).square().mean().backward()
        optimizer.step()
    found = timestep_embedding_losses(classifier, **arguments)
    assert found["original"] < found["diffusers"]

    with pytest.raises(DiveFastError, match=r"one label per image \(60\), got 3"):
        timestep_embedding_losses(classifier, held_out.images[:60], [0, 1, 2])


def test_the_published_xl_2_configuration_on_the_meta_device():
    """DiT-XL/2 as facebook/DiT-XL-2-256 has it: 28 blocks of 16 heads of 72."""
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(out_channels=8)
    state = {name: tuple(p.shape) for name, p in transformer.state_dict().items()}
    assert len(state) == 28 * 19 + 2 + 4
    first = "transformer_blocks.27.norm1."
    assert state[first + "emb.class_embedder.embedding_table.weight"] == (1001, 1152)
    assert state[first + "emb.timestep_embedder.linear_1.weight"] == (1152, 256)
    assert state[first + "linear.weight"] == (6 * 1152, 1152)
    assert state["pos_embed.proj.weight"] == (1152, 4, 2, 2)
    assert state["proj_out_2.weight"] == (2 * 2 * 8, 1152)
    embedders = sum(math.prod(shape) for name, shape in state.items() if ".norm1.emb." in name)
    assert embedders == 28 * (1001 * 1152 + 1152 * (256 + 1) + 1152 * (1152 + 1))
    convention = choose_timestep_embedding("auto", None, transformer.config)
    assert convention == "original"

    # Names and table come from the CPU; the network itself stays without storage.
    table = torch.nn.Embedding(1001, 1152).weight
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table.weight = torch.nn.Parameter(table)
    names = tuple(map(str, range(1000)))
    model = DiT(transformer, None, SCHEDULE, names, timestep_embedding=convention)
    assert len(model.vocabulary) == 1000 and model.vocabulary.dim == 1152
    x_t = torch.empty(3, 4, 32, 32, device="meta")
    t = torch.zeros(3, dtype=torch.int64, device="meta")
    assert model.predict(x_t, t, torch.empty(3, 1152, device="meta")).shape == (3, 8, 32, 32)


def test_the_convention_is_asked_stated_or_known_by_architecture():
    small = make_transformer().config
    assert choose_timestep_embedding("auto", None, small) == "diffusers"
    assert choose_timestep_embedding("auto", "original", small) == "original"
    assert choose_timestep_embedding("diffusers", "original", small) == "diffusers"
    with pytest.raises(ModelError, match="expected a timestep_embedding of auto, diffusers, orig"):
        choose_timestep_embedding("both", None, small)


@pytest.mark.parametrize("tied", [True, False])
def test_a_pipeline_saved_by_diffusers_loads_and_gives_the_same(tmp_path, tied):
    transformer, vae = make_transformer(tied=tied), make_vae().eval()
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    DiTPipeline(transformer, vae, scheduler).save_pretrained(tmp_path)
    x_t, t, labels = inputs()
    expected = transformer(x_t, timestep=t, class_labels=labels).sample

    classifier = DiffusionClassifier.from_pretrained(tmp_path)
    model = classifier.model
    assert model.vocabulary.dim == (16 if tied else 32)
    # diffusers drops id2label when it saves.
    assert classifier.names == tuple(f"class {i}" for i in range(N_CLASSES))
    assert model.image_shape == (3, 2 * SIZE, 2 * SIZE)
    found = model.predict(x_t, t, model.vocabulary.table[labels])
    torch.testing.assert_close(found, expected, **ROUNDING)
    torch.testing.assert_close(model.schedule.a**2, scheduler.alphas_cumprod, rtol=1e-5, atol=0)

    images = torch.rand(18, 3, 2 * SIZE, 2 * SIZE) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean * 0.18215
    torch.testing.assert_close(model.encode(images), latents, rtol=1e-4, atol=1e-5)
    assert classifier(torch.rand(3, 8, 8), probes=4, strategy="enumerate")[0].evaluations == 20


def test_the_config_that_was_published_first_loads_too(tmp_path):
    """facebook/DiT-XL-2-256 still says Transformer2DModel, with settings of that class."""
    DiTPipeline(make_transformer(), make_vae().eval(), DDIMScheduler()).save_pretrained(tmp_path)
    expected = DiffusionClassifier.from_pretrained(tmp_path).model
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.12.0.dev0",
        "cross_attention_dim": None,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    path.write_text(json.dumps(config))
    model = DiffusionClassifier.from_pretrained(tmp_path).model
    assert model.identity() == expected.identity()


def test_half_precision_stays_close_and_the_losses_stay_float32(tmp_path):
    write_model(tmp_path, make_square(), NAMES)
    full = DiffusionClassifier.from_pretrained(tmp_path)
    x0 = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    expected = full.losses(latents=x0, probes=10)
    for dtype in ("bfloat16", torch.float16):
        half = DiffusionClassifier.from_pretrained(tmp_path, dtype=dtype)
        found = half.losses(latents=x0, probes=10)
        assert found.dtype == torch.float32
        # bf16 keeps 8 bits: a few percent after two blocks.
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)
        assert len(half(latents=x0, strategy="invert", probes=10)) == 2


def make_square() -> DiTTransformer2DModel:
    """A model that ``write_model`` can rebuild from its config."""
    return make_transformer(learned_sigma=False)


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    DiTPipeline(make_transformer(), make_vae().eval(), DDIMScheduler()).save_pretrained(tmp_path)
    for component, message in [
        (SimpleNamespace(channels=3), "takes 3 channels, but its VAE gives 2"),
        (SimpleNamespace(channels=2, out=7), "expected 2 or 4 output channels .* got 7"),
    ]:
        torch.manual_seed(0)
        wrong = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=component.channels,
            out_channels=getattr(component, "out", None),
            num_layers=1,
            sample_size=SIZE,
            num_embeds_ada_norm=N_CLASSES,
        )
        wrong.save_pretrained(tmp_path / "transformer")
        with pytest.raises(ModelError, match=message):
            DiffusionClassifier.from_pretrained(tmp_path)
