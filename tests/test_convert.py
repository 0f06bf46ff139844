"""Latent-diffusion checkpoints, converted: the same output as before, and clear refusals."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from command import assert_refused, call
from ldm_reference import (
    ENCODER,
    FIRST,
    SMALL,
    UNET,
    Sizes,
    encode_layout,
    encode_picture,
    make_state,
    predict,
)
from safetensors.torch import save_file

from dive_fast.core.layouts import Layout, LayoutFormat
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.errors import ModelError
from dive_fast.models import load_model
from dive_fast.models.layout_to_image.convert import convert_layout_checkpoint, convert_state_dict

# The same fp32 operations, other attention kernels and another order of sums.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
NAMES = ["cat", "dog", "bird"]


@pytest.mark.parametrize("ema", [False, True])
def test_the_same_output_as_before(tmp_path, capsys, ema):
    state = make_state(SMALL, ema=ema)
    torch.save({"state_dict": state, "epoch": 3, "global_step": 5}, tmp_path / "model.ckpt")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n")
    said = call(
        capsys, "convert", tmp_path / "model.ckpt", "--out", tmp_path / "out",
        "--names", tmp_path / "names.txt", "--latent-size", 8,
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "2 objects of 3 classes on a 8 x 8 grid, images of 16 pixels" in said.out
    model = load_model(tmp_path / "out")
    assert model.layout_format == LayoutFormat.latent_diffusion(NAMES, 2, 70)
    assert model.latent_shape == (3, 8, 8) and model.image_shape == (3, 16, 16)
    assert model.layout_format.names == tuple(NAMES) and model.layout_format.none == 69

    layouts = [Layout(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
               Layout(torch.tensor([[0.1, 0.2, 0.5, 0.9]]), torch.tensor([1]))]  # fmt: skip
    tokens = torch.stack([model.layout_format.encode(layout) for layout in layouts])
    generator = torch.Generator().manual_seed(1)
    x_t, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 700])
    context = encode_layout(state, SMALL, tokens)
    hidden = model.layout_encoder(model.embed(tokens).unflatten(1, (8, 24)))
    torch.testing.assert_close(hidden, context, **ROUNDING)
    expected = predict(state, SMALL, x_t, t, context, ema)
    torch.testing.assert_close(model.predict(x_t, t, model.embed(tokens)), expected, **ROUNDING)
    swapped = predict(state, SMALL, x_t, t, context.flip(0), ema)
    assert (swapped - expected).abs().max() > 0.01  # the layout is seen
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    latents = encode_picture(state, SMALL, images)
    torch.testing.assert_close(model.encode(images), latents, **ROUNDING)


def test_another_model_is_not_written_over(tmp_path, capsys):
    """What was fitted to it would be taken for the new one's."""
    torch.save(make_state(SMALL), tmp_path / "model.ckpt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_index.json").write_text("{}")
    said = call(capsys, "convert", tmp_path / "model.ckpt", "--out", tmp_path / "out")
    assert_refused(said, "holds a model already; choose another --out")
    assert (tmp_path / "out" / "model_index.json").read_text() == "{}"


def test_the_average_is_preferred_and_must_be_whole():
    state = make_state(SMALL, ema=True)
    unet, *_ = convert_state_dict(state)
    assert torch.equal(unet.conv_in.weight, state["model_ema.diffusion_modelinput_blocks00weight"])
    assert not torch.equal(unet.conv_in.weight, state[f"{UNET}.input_blocks.0.0.weight"])
    del state["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ModelError, match="average of every UNet weight, found no .*out2bias"):
        convert_state_dict(state)


def test_published_configuration_on_the_meta_device():
    unet, encoder, vae, scheduler = convert_state_dict(make_state(Sizes(), meta=True))
    assert all(p.is_meta for m in (unet, encoder, vae) for p in m.parameters())
    config = unet.config
    assert list(config.block_out_channels) == [128, 256, 384, 512]
    assert list(config.attention_head_dim) == [4, 8, 12, 16]  # heads of 32 channels
    # 64 x 64 without attention, then 32, 16 and 8 with it.
    assert list(config.down_block_types) == ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3
    assert list(config.up_block_types) == ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"]
    assert (config.in_channels, config.out_channels, config.sample_size) == (3, 3, 64)
    assert (config.layers_per_block, config.transformer_layers_per_block) == (2, 3)
    assert config.cross_attention_dim == 512
    attention = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    assert attention.heads == 8 and attention.to_q.out_features == 256
    sizes = {k: encoder.config[k] for k in ("layers", "width", "heads", "head_dim")}
    assert sizes == {"layers": 16, "width": 512, "heads": 8, "head_dim": 64}
    assert (encoder.config.n_slots, encoder.config.vocabulary_size) == (92, 8192)
    layout = LayoutFormat.from_dict(encoder.config.layout)
    assert (layout.max_objects, layout.grid, layout.none, layout.crop) == (30, 90, 8191, True)
    assert (vae.config.vq_embed_dim, vae.config.num_vq_embeddings) == (3, 8192)
    assert list(vae.config.block_out_channels) == [128, 256, 512] and vae.config.sample_size == 256
    assert vae.config.scaling_factor == 1.0
    schedule = Schedule.from_config({"_class_name": "DDPMScheduler", **scheduler.config})
    expected = Schedule.from_betas(make_betas("scaled_linear", 1000, 0.0015, 0.0205))
    # diffusers makes its betas in float32.
    torch.testing.assert_close(schedule.a, expected.a, rtol=0, atol=1e-7)


def test_checkpoints_own_schedule_and_scale():
    state = make_state(SMALL)
    state["betas"], state["scale_factor"] = torch.linspace(0.01, 0.2, 10), torch.tensor(0.5)
    _, _, vae, scheduler = convert_state_dict(state)
    assert vae.config.scaling_factor == 0.5
    schedule = Schedule.from_config({"_class_name": "DDPMScheduler", **scheduler.config})
    torch.testing.assert_close(schedule.a, Schedule.from_betas(state["betas"]).a)
    for betas in ([0.0] * 10, [0.1, 1.0, 0.1], [float("nan")], [[0.1]], [], [1.1], 0.1):
        state["betas"] = torch.tensor(betas)
        with pytest.raises(ModelError, match="betas to be a list of numbers between 0 and 1"):
            convert_state_dict(state)


def test_betas_that_end_in_one_and_a_product_that_is_not_theirs(tmp_path):
    """A zero terminal SNR, which some trainings make of alpha_bar without the betas."""
    state = make_state(SMALL)
    state["betas"] = torch.tensor([0.1, 0.2, 1.0])
    state["alphas_cumprod"] = torch.tensor([0.9, 0.72, 0.0])
    torch.save(state, tmp_path / "model.ckpt")
    model = convert_layout_checkpoint(tmp_path / "model.ckpt", NAMES, latent_size=8)
    model.save_pretrained(tmp_path / "out")
    for read in (model, load_model(tmp_path / "out")):
        expected = torch.tensor([0.9, 0.72, 0.0]).sqrt()
        torch.testing.assert_close(read.schedule.a, expected)
    for other in ([0.9, 0.72, 0.1], [0.9, 0.72]):
        state["alphas_cumprod"] = torch.tensor(other)
        with pytest.raises(ModelError, match="alphas_cumprod to be the product of 1 - betas"):
            convert_state_dict(state)


def test_half_precision_and_safetensors(tmp_path):
    save_file({k: v.half() for k, v in make_state(SMALL).items()}, tmp_path / "m.safetensors")
    model = convert_layout_checkpoint(tmp_path / "m.safetensors", latent_size=8)
    assert model.unet.dtype == torch.float32
    # No names: every token but none may be a class.
    assert len(model.layout_format.names) == 69 and model.layout_format.names[7] == "class 7"


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_no_code_runs(tmp_path, capsys):
    torch.save({"state_dict": make_state(SMALL), "x": Evil()}, tmp_path / "evil.ckpt")
    said = call(capsys, "convert", tmp_path / "evil.ckpt", "--out", tmp_path / "out")
    assert_refused(said, "holds the object print, and only weights are read")
    assert "must not run" not in said.out and not (tmp_path / "out").exists()


def test_lightning_callbacks_are_passed_over(tmp_path, monkeypatch):
    """Their states are keyed by classes, which need not be installed."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, name, module)
        content = {"callbacks": {module.ModelCheckpoint: {"best": 1}}}
        torch.save({"state_dict": make_state(SMALL), **content}, tmp_path / "model.ckpt")
    assert (
        convert_layout_checkpoint(tmp_path / "model.ckpt", NAMES, latent_size=8).layout_format.grid
        == 8
    )


def without(prefix: str) -> dict:
    return {k: v for k, v in make_state(SMALL).items() if not k.startswith(prefix)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state dict in .*, got list"),
        ({"state_dict": 3}, "expected a state dict in .*, got int"),
        ({"epoch": 3}, "got 1 entries, no tensors"),
        ({"w": torch.zeros(1)}, r"with model.diffusion_model.\*, got 1 other entries \(w\)"),
        (without(ENCODER), r"with cond_stage_model.transformer.\*, got"),
        (without(FIRST), r"with first_stage_model.\*, got"),
        (without(f"{ENCODER}.token_emb"), "with cond_stage_model.transformer.token_emb.weight"),
        (without(f"{FIRST}.quantize"), "with first_stage_model.quantize.embedding.weight"),
        (without(f"{UNET}.middle_block.2"), "UNet2DConditionModel to have mid_block.* got none"),
        (without(f"{UNET}.out.2"), "with model.diffusion_model.out.2.weight, got another"),
        (without(f"{ENCODER}.norm.weight"), "to have norm.weight of shape .24., got none"),
        (without(f"{ENCODER}.attn_layers.layers.3"), "pairs of layers .*got 3 layers"),
    ],
    ids=range(12),
)
def test_files_that_hold_something_else(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "model.ckpt")
    said = call(capsys, "convert", tmp_path / "model.ckpt", "--out", tmp_path / "out")
    assert_refused(said, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{UNET}.label_emb.0.0.weight", torch.zeros(2), "also has .*label_emb.0.0.weight"),
        (f"{UNET}.conv.bias", torch.zeros(2), "also has .*conv.bias"),
        (f"{ENCODER}.pos_emb.emb.weight", torch.zeros(7, 24), "triples and perhaps .* got 7 slots"),
        (f"{ENCODER}.token_emb.weight", torch.zeros(64, 24), "none must be outside the coordinate"),
        (f"{FIRST}.encoder.down.1.attn.0.q.weight", torch.zeros(1), "attention in the middle"),
        (f"{UNET}.input_blocks.1.0.in_layers.2.bias", torch.zeros(3), r"shape \[32\], got \[3\]"),
        (f"{UNET}.out.2.bias", torch.full((3,), float("nan")), "conv_out.bias holds NaN"),
        (f"{UNET}.input_blocks.2.0.op.bias", None, "expected a whole latent-diffusion"),
        (f"{FIRST}.decoder.up.1.upsample.conv.bias", None, "expected a whole latent-diffusion"),
        ("scale_factor", torch.ones(2), "expected a whole latent-diffusion"),
        ("scale_factor", torch.tensor(float("nan")), "a scale_factor above 0, got nan"),
    ],
)
def test_other_architectures(tmp_path, name, value, message):
    changed = make_state(SMALL) | {name: value}
    if value is None:
        del changed[name]
    torch.save(changed, tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match=message):
        convert_layout_checkpoint(tmp_path / "model.ckpt", NAMES, latent_size=8)


def test_other_heads_and_names(tmp_path, capsys):
    path = tmp_path / "model.ckpt"
    torch.save(make_state(SMALL), path)
    with pytest.raises(ModelError, match="heads of 48 and 32 groups divide in .*, got 32"):
        convert_layout_checkpoint(path, NAMES, head_channels=48)
    with pytest.raises(ModelError, match="the class tokens .*none must be|none must be outside"):
        convert_layout_checkpoint(path, [str(i) for i in range(70)])
    for name in ("", " ", ["cat"], None, 3):
        with pytest.raises(ModelError, match="expected the name of class 1 as a text that is not"):
            convert_layout_checkpoint(path, ["cat", name])
    out = ("--out", tmp_path / "out", "--names", tmp_path / "names.txt")
    assert_refused(call(capsys, "convert", path, *out), "names.txt: expected a file of")
    for content, message in (
        ("\n", "at least one class, got an empty file"),
        ("prompt,classname\na cat,cat\n", "expected names alone, got prompts as well"),
    ):
        (tmp_path / "names.txt").write_text(content)
        assert_refused(call(capsys, "convert", path, *out), message)


def test_names_of_a_table(tmp_path, capsys):
    """By their numbers; equal ones get their rows."""
    torch.save(make_state(SMALL), tmp_path / "model.ckpt")
    (tmp_path / "names.csv").write_text("classidx,classname\n1,cat\n0,crane\n2,crane\n")
    said = call(
        capsys, "convert", tmp_path / "model.ckpt", "--names", tmp_path / "names.csv",
        "--latent-size", 8, "--out", tmp_path / "out",
    )  # fmt: skip
    assert said.code == 0 and "'crane (0)', 'crane (2)'" in said.err
    model = load_model(tmp_path / "out")
    assert model.layout_format.names == ("crane (0)", "cat", "crane (2)")


def test_files_that_are_no_checkpoint(tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert_refused(call(capsys, "convert", tmp_path / "none.ckpt", *out), "file at .*found none")
    for name, content in (("a.ckpt", b"text"), ("b.ckpt", b""), ("c.safetensors", b"text")):
        (tmp_path / name).write_bytes(content)
        said = call(capsys, "convert", tmp_path / name, *out)
        assert_refused(said, f"{name} cannot be read as a checkpoint: expected a state dict")
        assert "weights_only" not in said.err


def test_the_directory_states_its_parts(tmp_path):
    torch.save(make_state(SMALL), tmp_path / "model.ckpt")
    convert_layout_checkpoint(tmp_path / "model.ckpt", NAMES, latent_size=8).save_pretrained(
        tmp_path / "out"
    )
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "VQModel"]
    assert index["_class_name"] == "LayoutToImagePipeline"
