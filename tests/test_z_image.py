"""Z-Image as classifier: the network is asked what diffusers' pipeline asks it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from feature_checks import check_features, flow
from flow_families import (
    CLASSES,
    DAMAGES,
    PROMPTS,
    check_answers,
    check_losses,
    check_precisions,
    check_refused,
    check_size,
    edit,
    make_vae,
)
from pipelines import check_gradient, intercept, save
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from dive_fast import DiffusionClassifier
from dive_fast.core.condition import ConditionParts
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models import load_model
from dive_fast.models.transformers.z_image import ZImage

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """Every letter is a token, but for "photo"; byte level, as published."""
    letters = [*"abcdefghijklmnopqrstuvwxyz.,'!", "Ġ", "Ċ"]
    merges = [("p", "h"), ("ph", "o"), ("pho", "t"), ("phot", "o")]
    words = [*letters, *map("".join, merges)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=merges,
        unk_token=special[0], eos_token=special[2], pad_token=special[0],
        additional_special_tokens=special[1:],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_network(**changes: object) -> ZImageTransformer2DModel:
    options = dict(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[2, 2, 4], axes_lens=[600, 8, 8],
    )  # fmt: skip
    network = ZImageTransformer2DModel(**(options | changes)).eval()
    with torch.no_grad():  # zeros at first, like the weights of no published network
        for token in (network.x_pad_token, network.cap_pad_token):
            token.normal_()
    return network


def make_z_image() -> ZImagePipeline:
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=600,
        initializer_range=0.5,
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(),
        text_encoder=Qwen3Model(config).eval(),
        tokenizer=tokenizer,
        transformer=make_network(),
    )


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(make_z_image, tmp_path_factory.mktemp("z_image") / "model")
    edit(directory / "dive_fast.json", size=16)
    return directory


def test_the_network_is_asked_what_the_pipeline_asks(z_image: Path) -> None:
    pipeline = ZImagePipeline.from_pretrained(z_image)
    prompts = ["a photo of a ox.", "a photo of a beetle with ever so many hairy legs."]
    model = load_model(z_image, classes=["ox", "beetle with ever so many hairy legs"])
    assert model.latent_shape == (4, 8, 8)
    assert model.text.parts.shapes == {"sequence": (512, 16), "mask": (512,)}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = intercept(
        pipeline, pipeline.transformer, prompt=prompts, latents=latents, guidance_scale=0.0,
        sigmas=[1.0, 0.5, 0.25], num_inference_steps=3, height=16, width=16,
    )  # fmt: skip
    # The network is told 1 - sigma; the shift of 3 chooses among the sigmas of the training.
    assert [float(call.given["t"][0]) for call in asked] == [0, 0.25, 0.5]
    lengths = [len(tokens) for tokens in asked[0].given["cap_feats"]]
    assert model.vocabulary.table[:, -512:].sum(dim=1).tolist() == lengths
    # The network pads prompts to multiples of 32 tokens: here of two lengths.
    assert lengths[0] < 32 < lengths[1]
    for call in asked:
        t = ((1 - call.given["t"]) * 1000).round().long() - 1
        x_t = torch.stack(call.given["x"]).squeeze(2)
        found = model.predict(x_t, t, model.vocabulary.table)
        # The pipeline turns what the network gives around before its step towards the image.
        expected = -torch.stack(call.output).squeeze(2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (asked[1].output[0] - asked[1].output[1]).abs().max() > 1e-3  # the prompt is seen


def predict(pipeline: ZImagePipeline, x_t: torch.Tensor, sigma: float, prompt: str) -> torch.Tensor:
    """As train_dreambooth_lora_z_image.py: told (1000 - t) / 1000, and the sign turned around."""
    tokens, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    (found,) = pipeline.transformer([x_t[0].unsqueeze(1)], torch.tensor([1 - sigma]), tokens).sample
    return -found.squeeze(1)[None]


def test_losses_are_those_of_the_training(z_image: Path) -> None:
    check_losses(z_image, ZImagePipeline.from_pretrained(z_image), predict)


def test_features_are_what_the_blocks_give(z_image: Path) -> None:
    pipeline = ZImagePipeline.from_pretrained(z_image)
    clf = DiffusionClassifier.from_pretrained(z_image, classes=CLASSES)
    check_features(
        clf,
        pipeline.transformer,
        lambda x_t, t, c: predict(pipeline, x_t, (t + 1) / 1000, PROMPTS[c]),
        flow,
        {
            # 16 tokens of the image, then padding to 32, and the prompt.
            "noise_refiner.0": lambda output: output[:, :16],
            "layers.0": lambda output: output[:, :16],
        },
    )


def test_blocks_that_see_the_prompt_alone_are_no_layers(z_image: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(z_image, classes=CLASSES)
    with pytest.raises(DiveFastError, match="expected a layer of .* got 'context_refiner.0'"):
        clf.features(latents=torch.zeros(1, 4, 8, 8), layer="context_refiner.0")


def test_the_gradient_is_that_of_finite_differences(z_image: Path) -> None:
    check_gradient(load_model(z_image, classes=CLASSES))


def test_what_is_behind_a_prompt_is_not_seen(z_image: Path) -> None:
    model = load_model(z_image, classes=CLASSES)
    row = model.vocabulary.table[:1].clone().requires_grad_()
    n = int(row[0, -512:].sum())
    x_t, t = torch.zeros(1, 4, 8, 8), torch.tensor([500])
    model.predict(x_t, t, row).square().mean().backward()
    sequence = row.grad[0, :-512].view(512, 16)
    assert (sequence[:n] != 0).any(dim=1).all() and (sequence[n:] == 0).all()
    assert (row.grad[0, -512:] == 0).all()


def test_it_answers(z_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_answers(z_image, tmp_path, capsys)


def test_other_precisions(z_image: Path) -> None:
    check_precisions(z_image)


def test_other_sizes(z_image: Path, tmp_path: Path) -> None:
    check_size(z_image, tmp_path)


@pytest.mark.parametrize("what", [*DAMAGES])
def test_refused(
    z_image: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(z_image, tmp_path, what, capsys)


def test_a_tokenizer_without_a_chat_template(z_image: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(z_image, broken)
    (broken / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="cannot be used by ZImagePipeline: .*chat template"):
        load_model(broken, classes=CLASSES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"axes_lens": [600, 8, 2]}, "a multiple of 4 pixels, at most 8, .*, got 16"),
        ({"cap_feat_dim": 8}, "'sequence' of width 8, but its text encoders give 16"),
        ({"all_patch_size": [4]}, r"patches of 2 x 2 .*, got \[\(4, 1\)\]"),
    ],
    ids=["positions", "width", "patches"],
)
def test_networks_that_do_not_fit(
    z_image: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(z_image, broken)
    make_network(**changes).save_pretrained(broken / "transformer")
    with pytest.raises(ModelError, match=message):
        load_model(broken, classes=CLASSES)


def test_the_published_configuration_on_the_meta_device() -> None:
    """Z-Image-Turbo."""
    with torch.device("meta"):
        network = ZImageTransformer2DModel(
            all_patch_size=[2], all_f_patch_size=[1], in_channels=16, dim=3840, n_layers=30,
            n_refiner_layers=2, n_heads=30, n_kv_heads=30, qk_norm=True, cap_feat_dim=2560,
            rope_theta=256.0, t_scale=1000.0, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
        )  # fmt: skip
    ZImage.check_network(network, Path("z-image"))
    assert ZImage.latents(network) == (16, 128, 128)
    assert 128 in ZImage.sides(network)
    parts = ConditionParts({"sequence": (512, 2560), "mask": (512,)}, ZImage.constants)
    assert parts.dim == 1_311_232
    x_t = [torch.empty(16, 1, 128, 128, device="meta")]
    tokens = [torch.empty(40, 2560, device="meta")]  # lengths are values, which meta has not
    (found,) = network(x_t, torch.zeros(1, device="meta"), tokens).sample
    assert found.shape == (16, 1, 128, 128)
