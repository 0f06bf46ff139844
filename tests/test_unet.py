"""The stages of a UNet give what its own forward gives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_unet import LAYOUTS, make_inputs, make_unet
from torch.utils.flop_counter import FlopCounterMode

from dive_fast.errors import ModelError
from dive_fast.models.unet.stages import (
    check_supported,
    condition_enters_time,
    decoder,
    encoder,
    prefix,
    project,
)


def staged(unet, sample, timestep, encoder_hidden_states, added_cond_kwargs=None):
    kv = project(unet, encoder_hidden_states, added_cond_kwargs)
    return decoder(unet, encoder(unet, prefix(unet, sample, timestep), kv), kv)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [8, 9])
def test_equals_forward(layout, size):
    unet = make_unet(layout)
    check_supported(unet)
    inputs = make_inputs(unet, rows=3, size=size)
    with torch.no_grad():
        torch.testing.assert_close(staged(unet, **inputs), unet(**inputs).sample)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_loses_no_more_than_forward(layout):
    unet = make_unet(layout)
    inputs = make_inputs(unet, rows=2)
    half = copy.deepcopy(unet).bfloat16()
    halved = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    if "added_cond_kwargs" in inputs:
        added = inputs["added_cond_kwargs"]
        halved["added_cond_kwargs"] = {**added, "text_embeds": added["text_embeds"].bfloat16()}
    with torch.no_grad():
        exact = unet(**inputs).sample
        lost = (half(**halved).sample.float() - exact).abs().max()
        result = staged(half, **halved)
    assert result.dtype == torch.bfloat16
    assert (result.float() - exact).abs().max() <= 2 * lost


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_the_condition(layout):
    unet = make_unet(layout)
    inputs = make_inputs(unet, rows=2)
    weights = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for forward in (lambda **x: unet(**x).sample, lambda **x: staged(unet, **x)):
        leaf = inputs["encoder_hidden_states"].clone().requires_grad_()
        leaves = [leaf]
        arguments = {**inputs, "encoder_hidden_states": leaf}
        if condition_enters_time(unet):
            pooled = inputs["added_cond_kwargs"]["text_embeds"].clone().requires_grad_()
            leaves.append(pooled)
            arguments["added_cond_kwargs"] = {
                **inputs["added_cond_kwargs"],
                "text_embeds": pooled,
            }
        gradients.append(torch.autograd.grad((forward(**arguments) * weights).sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_are_gathered_by_row(layout):
    """One (x_t, t) under several conditions: prefix and projections are computed once."""
    unet = make_unet(layout)
    inputs = make_inputs(unet, rows=3)
    added = inputs.pop("added_cond_kwargs", None)
    one = torch.tensor([1, 1, 1])
    with torch.no_grad():
        start = prefix(unet, inputs["sample"], inputs["timestep"])
        kv = project(unet, inputs["encoder_hidden_states"], added)
        result = encoder(unet, tuple(x[one] for x in start), kv)
        result = decoder(unet, result, kv)
        expected = unet(
            inputs["sample"][one],
            inputs["timestep"][one],
            inputs["encoder_hidden_states"],
            added_cond_kwargs=added,
        ).sample
    torch.testing.assert_close(result, expected)
    assert (result[0] - result[1]).abs().max() > 1e-3


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7])])
def test_one_timestep_for_all_rows(timestep):
    unet = make_unet()
    inputs = {**make_inputs(unet), "timestep": timestep}
    with torch.no_grad():
        torch.testing.assert_close(staged(unet, **inputs), unet(**inputs).sample)


UNSUPPORTED = {
    "class embeddings": {"num_class_embeds": 3},
    "addition_embed_type 'text'": {"addition_embed_type": "text", "encoder_hid_dim": 24},
    "encoder_hid_proj": {"encoder_hid_dim": 12, "encoder_hid_dim_type": "text_proj"},
    "even conv_in_kernel": {"conv_in_kernel": 4},
    "only_cross_attention": {"only_cross_attention": True},
    "UNetMidBlock2D": {"mid_block_type": "UNetMidBlock2D"},
    "DualTransformer2DModel": {"dual_cross_attention": True},
    "SimpleCrossAttnDownBlock2D": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    },
    "without cross-attention in its down blocks": {
        "down_block_types": ("DownBlock2D", "DownBlock2D")
    },
}


@pytest.mark.parametrize("said", UNSUPPORTED)
def test_refused_configurations(said):
    unet = make_unet(**UNSUPPORTED[said])
    with pytest.raises(ModelError, match=said) as error:
        check_supported(unet)
    assert str(error.value).count("\n") == 0


def subclassed(unet):
    unet.__class__ = type("Mine", (UNet2DConditionModel,), {"forward": lambda self, *a: None})


ATTACHED = {
    "attention processor AttnProcessor": lambda u: u.set_attn_processor(AttnProcessor()),
    "FusedAttnProcessor2_0": lambda u: u.fuse_qkv_projections(),
    "FreeU": lambda u: u.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "chunked": lambda u: (
        u.down_blocks[0].attentions[0].transformer_blocks[0].set_chunk_feed_forward(2)
    ),
    "hooks": lambda u: u.down_blocks[0].register_forward_hook(lambda *a: None),
    "replaced forward": lambda u: setattr(u.mid_block, "forward", u.mid_block.forward),
    "subclass Mine": subclassed,
}


@pytest.mark.parametrize("said", ATTACHED)
def test_refused_attachments(said):
    unet = make_unet()
    ATTACHED[said](unet)
    with pytest.raises(ModelError, match=said):
        check_supported(unet)


def test_refuses_other_networks():
    with pytest.raises(ModelError, match="got a Linear"):
        check_supported(torch.nn.Linear(1, 1))


def test_bad_rows():
    unet = make_unet()
    inputs = make_inputs(unet)
    state = prefix(unet, inputs["sample"], inputs["timestep"])
    kv = project(unet, inputs["encoder_hidden_states"][:2])
    with pytest.raises(ModelError, match="of 3 rows.*got 2"):
        encoder(unet, state, kv)
    xl = make_unet("sdxl")
    inputs = make_inputs(xl)
    state = prefix(xl, inputs["sample"], inputs["timestep"])
    with pytest.raises(ModelError, match="added_cond_kwargs"):
        encoder(xl, state, project(xl, inputs["encoder_hidden_states"]))


# As published in the checkpoints' unet/config.json.
SD_1_5 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD_2_1 = {
    "sample_size": 96,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# name: configuration, cross-attentions, share of the prefix, share of K and V
PUBLISHED = {
    "sd 1.5": (SD_1_5, 16, 0.0509, 0.00368),
    "sd 2.1": (SD_2_1, 16, 0.0709, 0.00183),  # 0.0508 and 0.00489 at 64 x 64
    "sdxl": (SDXL, 70, 0.0000564, 0.00776),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_on_meta(name):
    config, attentions, prefix_share, kv_share = PUBLISHED[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).requires_grad_(False).eval()
        side, width = config["sample_size"], config["cross_attention_dim"]
        x_t, t, text = torch.empty(2, 4, side, side), torch.zeros(2), torch.empty(2, 77, width)
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
    check_supported(unet)
    flops = {}

    def counted(stage, function):
        with FlopCounterMode(display=False) as counter:
            result = function()
        flops[stage] = counter.get_total_flops()
        return result

    start = counted("prefix", lambda: prefix(unet, x_t, t))
    kv = counted("project", lambda: project(unet, text, added))
    encoded = counted("encoder", lambda: encoder(unet, start, kv))
    prediction = counted("decoder", lambda: decoder(unet, encoded, kv))
    plain = counted("plain", lambda: unet(x_t, t, text, added_cond_kwargs=added).sample)

    assert prediction.shape == plain.shape == x_t.shape
    assert len(kv) == 2 * attentions + (name == "sdxl")
    assert all(x.shape[:2] == (2, 77) for x in kv[: 2 * attentions])
    assert all(len(x) == 2 for x in (*start, *encoded))
    shapes = [(2, 1280), (2, 320, side, side)]
    if name == "sdxl":
        assert kv[-1].shape == (2, 1280)
    else:
        shapes += [(2, 320, side, side), (2, side**2, 320)]
    assert [x.shape for x in start] == shapes
    deepest = side // 2 ** (len(config["block_out_channels"]) - 1)
    assert encoded[-1].shape == (2, 1280, deepest, deepest)

    total = flops.pop("plain")
    assert sum(flops.values()) == total
    assert math.isclose(flops["prefix"] / total, prefix_share, rel_tol=0.01)
    assert math.isclose(flops["project"] / total, kv_share, rel_tol=0.01)
