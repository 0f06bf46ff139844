"""What a VAE's configuration does to x0, against diffusers' own pipelines; the rest is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    VQModel,
)
from PIL import Image
from tiny_geodiffusion import write_geodiffusion
from tiny_gligen import write_gligen

from dive_fast import ModelError
from dive_fast.models import load_model
from dive_fast.models.autoencoder import encode_latents, normalisation

MEAN, STD = [-1.6, 1.0, 0.5, -0.2], [8.4, 6.0, 5.0, 0.7]  # like Playground 2.5's
STATISTICS = {"latents_mean": MEAN, "latents_std": STD}
CPU = torch.device("cpu")


def changed(source: Path, target: Path, part: str = "vae", **changes: object) -> Path:
    """A copy of a model directory with other entries in its VAE's configuration."""
    shutil.copytree(source, target)
    path = target / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def make_vae(**options: object) -> AutoencoderKL:
    torch.manual_seed(0)
    shape = dict(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16)
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    return AutoencoderKL(**{**shape, **blocks, **options}).eval()


def pictures(n: int = 2, side: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def of_the_pipeline(kind: type, directory: Path, images: torch.Tensor) -> torch.Tensor:
    """x0 by the pipeline's own ``prepare_latents``, the posterior's mean for its sample."""
    pipe = kind.from_pretrained(directory, safety_checker=None)
    encode = pipe.vae.encode

    def encode_to_the_mean(x: torch.Tensor) -> object:
        output = encode(x)
        output.latent_dist.sample = lambda generator=None: output.latent_dist.mean
        return output

    pipe.vae.encode = encode_to_the_mean
    # The noise of timestep 0 is left out: the schedule's factors are then 1 and 0.
    pipe.scheduler.add_noise = lambda x0, noise, t: x0
    with torch.no_grad():
        return pipe.prepare_latents(
            images, torch.tensor([1]), len(images), 1, torch.float32, CPU
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, STATISTICS, {**STATISTICS, "scaling_factor": 0.5}])
def test_x0_of_sdxl_is_that_of_its_pipeline(sdxl: Path, tmp_path: Path, options: dict) -> None:
    directory = changed(sdxl, tmp_path / "model", **options)
    expected = of_the_pipeline(StableDiffusionXLImg2ImgPipeline, directory, pictures())
    model = load_model(directory, device="cpu", classes=["cat", "dog"])
    torch.testing.assert_close(model.encode(pictures()), expected, rtol=1e-5, atol=1e-6)
    plain = load_model(sdxl, device="cpu", classes=["cat", "dog"]).encode(pictures())
    assert (plain - expected).abs().max() > (0.1 if options else -1)


@pytest.mark.filterwarnings("ignore")
def test_x0_of_sd_is_that_of_its_pipeline(sd: Path, tmp_path: Path) -> None:
    directory = changed(sd, tmp_path / "model", scaling_factor=0.3, shift_factor=0)
    expected = of_the_pipeline(StableDiffusionImg2ImgPipeline, directory, pictures())
    model = load_model(directory, device="cpu", classes=["cat", "dog"])
    torch.testing.assert_close(model.encode(pictures()), expected, rtol=1e-5, atol=1e-6)


def write(kind: str, sources: dict[str, Path], target: Path) -> Path:
    if kind == "gligen":
        return write_gligen(target)
    return write_geodiffusion(target) if kind == "geodiffusion" else sources[kind]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "gligen", "geodiffusion", "dit"])
def test_what_a_pipeline_does_not_apply_is_refused(
    kind: str, sd: Path, sdxl: Path, latent_dit_dir: Path, tmp_path: Path
) -> None:
    sources = {"sd": sd, "sdxl": sdxl, "dit": latent_dit_dir}
    source = write(kind, sources, tmp_path / "source")
    options = {} if kind == "dit" else {"classes": ["cat", "dog"]}
    ignored = {"shift_factor": 0.1}
    if kind != "sdxl":
        ignored |= STATISTICS
    for i, (key, value) in enumerate(ignored.items()):
        directory = changed(source, tmp_path / str(i), **{key: value})
        with pytest.raises(ModelError, match=f"states {key}, which a .*Pipeline does not apply"):
            load_model(directory, device="cpu", **options)


def test_a_layout_model_applies_all(tmp_path: Path) -> None:
    """The family is this library's own: a VAE means what it states."""
    from tiny_layout import make_layout_model

    make_layout_model(vae="kl").save_pretrained(tmp_path / "model")  # 2 channels, shift 0.1
    statistics = {"latents_mean": [0.3, -0.7], "latents_std": [2.0, 0.5], "shift_factor": None}
    directory = changed(tmp_path / "model", tmp_path / "other", **statistics)
    shifted, standard = (
        load_model(d, device="cpu").encode(pictures(side=8))
        for d in (tmp_path / "model", directory)
    )
    raw = shifted / 0.7 + 0.1
    mean, std = torch.tensor([[0.3, -0.7], [2.0, 0.5]]).view(2, 1, 2, 1, 1)
    torch.testing.assert_close(standard, (raw - mean) * 0.7 / std, rtol=1e-4, atol=1e-5)
    both = changed(tmp_path / "model", tmp_path / "both", **{**statistics, "shift_factor": 0.1})
    with pytest.raises(ModelError, match="expected shift_factor or latents_mean .* got both"):
        load_model(both, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents_mean": MEAN}, "both latents_mean and latents_std .* got one of them"),
        ({"latents_std": STD}, "both latents_mean and latents_std .* got one of them"),
        ({**STATISTICS, "shift_factor": 0.1}, "shift_factor or latents_mean of the VAE, got both"),
        ({**STATISTICS, "latents_mean": MEAN[:3]}, "latents_mean of the VAE must be 4 numbers"),
        ({**STATISTICS, "latents_std": [*STD, 1.0]}, "latents_std of the VAE must be 4 numbers"),
        ({**STATISTICS, "latents_mean": 0.3}, "latents_mean .* 4 numbers, .* got 0.3"),
        ({**STATISTICS, "latents_mean": "1234"}, "latents_mean .* 4 numbers, .* got '1234'"),
        ({**STATISTICS, "latents_mean": [True] * 4}, "latents_mean of the VAE must be 4 numbers"),
        ({**STATISTICS, "latents_mean": [10**400] * 4}, "must be 4 numbers"),
        ({**STATISTICS, "latents_std": [1, 1, 1, 0]}, r"must be above 0, got \[1.0, 1.0, 1.0, 0"),
        ({**STATISTICS, "latents_std": [1, 1, 1, -1]}, "latents_std of the VAE must be above 0"),
        ({**STATISTICS, "latents_std": [1, 1, 1, 1e-60]}, "latents_std .* must be above 0"),
        ({**STATISTICS, "latents_std": [1, 1, 1, float("nan")]}, "latents_std .* 4 numbers"),
        *(({"scaling_factor": value}, "scaling_factor of the VAE must be a number above 0")
          for value in (0, -0.1, None, "0.18", True, float("inf"), 1e300, 1e-300, [0.1])),
        *(({"shift_factor": value}, "shift_factor of the VAE must be a number, got")
          for value in ("0.1", True, float("nan"), [0.1])),
    ],
    ids=range(26),
)  # fmt: skip
def test_statistics_that_make_no_sense_are_one_sentence(options: dict, message: str) -> None:
    vae = make_vae(**options)
    for read in (lambda: normalisation(vae), lambda: encode_latents(vae, pictures(), CPU)):
        with pytest.raises(ModelError, match=message) as error:
            read()
        assert len(str(error.value)) < 250 and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["latents_scale", "scale_factor", "latent_bias", "z_mean", "shift"])
def test_a_key_that_may_change_the_latents_and_is_not_known(
    key: str, sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = changed(sdxl, tmp_path / "model", **{key: 2.0})
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    said = call(
        capsys, "classify", tmp_path / "a.png", "--model", directory, "--classes", "cat,dog"
    )  # fmt: skip
    assert_refused(said, f"VAE in .* cannot be used: the VAE states {key}, which is not known")


def test_a_key_that_has_nothing_to_do_with_latents_is_passed_over(sdxl, tmp_path) -> None:
    directory = changed(sdxl, tmp_path / "model", trained_by="us", latents_extra=None)
    load_model(directory, device="cpu", classes=["cat", "dog"])


def test_a_vq_model_is_scaled() -> None:
    torch.manual_seed(0)
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.5).eval()
    with torch.no_grad():
        expected = vae.encode(pictures()).latents * 0.5
    torch.testing.assert_close(encode_latents(vae, pictures(), CPU), expected)


def with_tiny_vae(source: Path, target: Path, channels: int, side: int) -> tuple[Path, object]:
    """A copy of a model directory whose VAE is an ``AutoencoderTiny`` of as many channels."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "vae")
    halvings = side.bit_length() - 1
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(4,) * (halvings + 1),
        # A decoder of another depth, which says nothing about the latents.
        decoder_block_out_channels=(4,) * 2,
        num_encoder_blocks=(1,) * (halvings + 1),
        num_decoder_blocks=(1,) * 2,
        scaling_factor=0.6,
    ).eval()
    vae.save_pretrained(target / "vae")
    path = target / "model_index.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"vae": ["diffusers", "AutoencoderTiny"]})
    )
    return target, vae


@pytest.mark.parametrize("kind", ["sd", "sdxl", "gligen", "geodiffusion", "dit", "layout"])
def test_a_tiny_autoencoder_in_the_place_of_the_usual_one(
    kind: str, sd: Path, sdxl: Path, latent_dit_dir: Path, tmp_path: Path
) -> None:
    sources = {"sd": sd, "sdxl": sdxl, "dit": latent_dit_dir}
    if kind == "layout":
        from tiny_layout import make_layout_model

        make_layout_model(vae="kl").save_pretrained(tmp_path / "source")
        source = tmp_path / "source"
    else:
        source = write(kind, sources, tmp_path / "source")
    options = {} if kind in ("dit", "layout") else {"classes": ["cat", "dog"]}
    before = load_model(source, device="cpu", **options)
    channels, side, _ = before.latent_shape
    factor = before.image_shape[1] // side
    directory, vae = with_tiny_vae(source, tmp_path / "model", channels, factor)
    model = load_model(directory, device="cpu", **options)
    assert (model.latent_shape, model.image_shape) == (before.latent_shape, before.image_shape)
    images = pictures(side=model.image_shape[1])
    with torch.no_grad():
        expected = vae.encode(images).latents * 0.6
    torch.testing.assert_close(model.encode(images), expected)
    assert model.identity()["vae_weights"] != before.identity()["vae_weights"]


@pytest.mark.filterwarnings("ignore")
def test_x0_of_a_tiny_autoencoder_is_that_of_its_pipeline(sd: Path, tmp_path: Path) -> None:
    channels, factor = 4, 2
    directory, _ = with_tiny_vae(sd, tmp_path / "model", channels, factor)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(directory, safety_checker=None)
    pipe.scheduler.add_noise = lambda x0, noise, t: x0
    with torch.no_grad():
        expected = pipe.prepare_latents(pictures(), torch.tensor([1]), 2, 1, torch.float32, CPU)
    model = load_model(directory, device="cpu", classes=["cat", "dog"])
    torch.testing.assert_close(model.encode(pictures()), expected)
