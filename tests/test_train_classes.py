"""Training on photographs of one's own: what is learned, resuming, and the model that comes out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from cut_off import cut_off
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from tiny_classes import NAMES, TINY, train, weights, write_colours

from dive_fast import DiffusionClassifier
from dive_fast.data.images import as_images
from dive_fast.errors import DataError, DiveFastError, ModelError, RunError
from dive_fast.evaluation.checkpoints import find_checkpoints
from dive_fast.training import classes_learner as learning
from dive_fast.training.augmentation import Augmentation
from dive_fast.training.classes import train_classes
from dive_fast.training.classes_data import open_classes
from dive_fast.training.classes_learner import spread_timesteps
from dive_fast.training.classes_parts import divided


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("pictures"))


def tiny_vae(kind: str = "tiny", channels: int = 3, latents: int = 2):
    """Random weights; two pixels a latent."""
    torch.manual_seed(0)
    if kind == "tiny":
        return AutoencoderTiny(
            in_channels=channels,
            out_channels=channels,
            latent_channels=latents,
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=latents,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        shift_factor=0.4,
        **blocks,
    )


def test_end_to_end_in_pixels(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    sizes = ["--size", 8, "--patch-size", 4, "--width", 16, "--heads", 2, "--layers", 1]
    arguments = ["--data", folder, "--out", out, *sizes, "--held-out", 0.5, "--batch-size", 6]
    said = call(
        capsys, "train-classes", *arguments, "--steps", 4, "--samples-every", 2, "--no-flip",
        "--readers", 0, "--bf16",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "learned from 12 pictures" in said.out and "guessing: 33.3%" in said.out
    assert "fitted to 6 pictures; of 6 others, neither learned nor fitted to" in said.out
    facts = json.loads((out / "dive_fast.json").read_text())
    assert facts["timestep_embedding"] == "diffusers" and facts["beta"] > 0
    assert facts["config"]["augmentation"] == {"flip": False, "crop": 0.3, "colour": 0.3}
    assert len(facts["timesteps"]["density"]) > 1 and facts["expected"]["n"] == 6
    with Image.open(out / "samples" / "000004.png") as samples:
        assert samples.size == (6 * 8, 3 * 8) and samples.mode == "RGB"
    classifier = DiffusionClassifier.from_pretrained(out)
    assert classifier.names == NAMES and classifier.model.image_shape == (3, 8, 8)
    assert classifier.model.inverse_temperature == facts["beta"]
    said = call(capsys, "classify", folder / "red" / "0.png", "--model", out, "--probes", 4)
    assert said.code == 0 and said.out.split()[1] in NAMES
    said = call(capsys, "train-classes", *arguments)
    assert_refused(said, "holds a model already; choose another --out")


def test_checkpoints(folder: Path, tmp_path: Path) -> None:
    """With averages of then: the last is the model, and all of them can be compared."""
    train(folder, tmp_path, checkpoints=3)
    found = find_checkpoints(tmp_path)
    assert [checkpoint.step for checkpoint in found] == [1, 2, 4]
    of_all = [weights(checkpoint.path) for checkpoint in found]
    name = "proj_out_2.weight"
    assert torch.equal(of_all[-1][name], weights(tmp_path)[name])
    assert not torch.equal(of_all[0][name], of_all[1][name])
    assert DiffusionClassifier.from_pretrained(found[0].path).names == NAMES


def test_colours_are_learned(folder: Path, tmp_path: Path) -> None:
    """Classes that one look tells apart; the figure is that of the pictures held out."""
    config = dataclasses.replace(
        TINY, steps=150, batch_size=16, learning_rate=1e-2, ema_decay=0.95, samples_every=1000,
        augmentation=Augmentation(flip=True),
    )  # fmt: skip
    trained = train(folder, tmp_path / "out", config, held_out=0.5)
    assert trained.losses["held_out"] < 0.95 * trained.losses["none"]
    assert trained.expected.accuracy == 1.0 and trained.expected.n == 6
    assert trained.parts == (12, 6, 6) and trained.n_classes == 3
    classifier = DiffusionClassifier.from_pretrained(tmp_path / "out")
    found = [classifier(folder / name / "3.png")[0].label for name in NAMES]
    assert tuple(found) == NAMES


@pytest.mark.parametrize(
    ("objective", "target"), [("ddpm", "epsilon"), ("flow", "flow"), ("x0", "sample")]
)
def test_the_classifier_measures_the_loss_that_was_trained(
    objective: str, target: str, folder: Path, tmp_path: Path
) -> None:
    """The mean over held-out pictures of the classifier's losses is the loss that was logged."""
    config = dataclasses.replace(TINY, objective=objective, steps=30, learning_rate=1e-2)
    trained = train(folder, tmp_path / "out", config, held_out=0.5)
    classifier = DiffusionClassifier.from_pretrained(tmp_path / "out")
    assert classifier.model.schedule.target == target
    dataset, names = open_classes(folder)
    rows = torch.cat(divided(torch.from_numpy(dataset.labels), 0.5, 0)[1:]).tolist()
    pictures = [dataset.examples[i].load() for i in rows]
    losses = classifier.losses(pictures, probes=200).mean(dim=2)
    own = losses.gather(1, torch.from_numpy(dataset.labels[rows])[:, None]).mean().item()
    assert own == pytest.approx(trained.losses["held_out"], rel=0.1)


def test_grey_pictures_of_numbered_classes(tmp_path: Path) -> None:
    """An ``.npz`` of two classes without names."""
    images = np.random.default_rng(0).integers(256, size=(9, 10, 10), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.array([0, 1, 1] * 3))
    trained = train(tmp_path / "data.npz", tmp_path / "out", dataclasses.replace(TINY, grey=True))
    assert trained.parts == (5, 2, 2)
    classifier = DiffusionClassifier.from_pretrained(tmp_path / "out")
    assert classifier.names == ("0", "1") and classifier.model.latent_shape == (1, 8, 8)
    with Image.open(tmp_path / "out" / "samples" / "000004.png") as samples:
        assert samples.mode == "L"


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_latents_of_an_autoencoder(kind: str, folder: Path, tmp_path: Path) -> None:
    """Of mean square 1, whatever the autoencoder states; the stored one gives the same."""
    vae = tiny_vae(kind)
    # Alone, or as a part of a model.
    place = tmp_path / "vae" if kind == "tiny" else tmp_path / "whole" / "vae"
    vae.save_pretrained(place)
    place = place if kind == "tiny" else place.parent
    config = dataclasses.replace(TINY, image_size=16, patch_size=2)
    train(folder, tmp_path / "out", config, vae=place)
    classifier = DiffusionClassifier.from_pretrained(tmp_path / "out")
    assert classifier.model.latent_shape == (2, 8, 8)
    assert classifier.model.image_shape == (3, 16, 16)
    files = sorted(folder.rglob("*.png"))
    x0 = classifier.encode(list(map(str, files)))
    assert 0.8 < x0.square().mean() < 1.25
    scale = json.loads((tmp_path / "out" / "vae" / "config.json").read_text())["scaling_factor"]
    with torch.no_grad():
        encoded = vae.eval().encode(as_images(str(files[0]), 16, 3)[0][None])
    z = encoded.latents if kind == "tiny" else encoded.latent_dist.mean
    torch.testing.assert_close(x0[:1], scale * z, rtol=1e-4, atol=1e-5)
    with Image.open(tmp_path / "out" / "samples" / "000004.png") as samples:
        assert samples.size == (6 * 16, 3 * 16)


@pytest.mark.parametrize("latents", [False, True])
def test_training_that_was_cut_off_goes_on(
    latents: bool, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """Bit for bit the weights and the figures of the uncut run."""
    more: dict[str, object] = {"config": dataclasses.replace(TINY, contrast=0.5)}
    if latents:
        tiny_vae().save_pretrained(tmp_path / "vae")
        more["vae"] = tmp_path / "vae"
    expected = train(folder, tmp_path / "uncut", **more)
    with cut_off() as ctrl_c, monkeypatch.context() as patch:

        def spread(n: int, *arguments) -> torch.Tensor:
            if n == TINY.batch_size:
                steps.append(n)
            if len(steps) == 3:
                ctrl_c()
            return spread_timesteps(n, *arguments)

        steps: list[int] = []
        patch.setattr(learning, "spread_timesteps", spread)
        train(folder, tmp_path / "cut", **more)
    assert not (tmp_path / "cut" / "model_index.json").exists()
    found = train(folder, tmp_path / "cut", **more)
    assert found.losses == expected.losses
    same = {"seconds": 0.0}
    assert dataclasses.replace(found.expected, **same) == dataclasses.replace(
        expected.expected, **same
    )
    for name, weight in weights(tmp_path / "uncut").items():
        assert torch.equal(weights(tmp_path / "cut")[name], weight), name
    for name in ("dive_fast.json", "model_index.json"):  # as if it had been cut off
        (tmp_path / "cut" / name).unlink()
    with pytest.raises(RunError, match="or other data"):
        train(folder, tmp_path / "cut", held_out=0.3, **more)


def test_a_run_that_was_killed_while_it_was_measured_goes_on(folder: Path, tmp_path: Path) -> None:
    expected = train(folder, tmp_path / "out")
    (tmp_path / "out" / "dive_fast.json").unlink()
    found = train(folder, tmp_path / "out")
    assert (found.expected.accuracy, found.losses) == (expected.expected.accuracy, expected.losses)


def test_parts_share_no_picture() -> None:
    """Every class is held out by its share, at least two, and every picture is in one part."""
    labels = torch.tensor([0] * 3 + [1] * 20 + [2] * 41)
    parts = divided(labels, 0.25, seed=0)
    assert sorted(torch.cat(parts).tolist()) == list(range(64))
    for part, counts in zip(parts, ([1, 15, 31], [1, 3, 5], [1, 2, 5]), strict=True):
        assert torch.bincount(labels[part], minlength=3).tolist() == counts
    again, other = divided(labels, 0.25, seed=0), divided(labels, 0.25, seed=1)
    assert torch.equal(again.test, parts.test) and not torch.equal(other.test, parts.test)


def test_timesteps_are_spread() -> None:
    """One in each n-th of the schedule, and all of them possible."""
    seen = []
    for seed in range(200):
        t = spread_timesteps(10, 100, torch.Generator().manual_seed(seed))
        assert sorted((t // 10).tolist()) == list(range(10))
        seen += t.tolist()
    assert set(seen) == set(range(100))


def test_pictures_that_cannot_be_read_are_left_out(folder: Path, tmp_path: Path) -> None:
    import shutil

    data, said = tmp_path / "data", []
    shutil.copytree(folder, data)
    (data / "red" / "3.png").write_bytes(b"no image")
    trained = train_classes(data, tmp_path / "out", config=TINY, progress=False, tell=said.append)
    assert sum(trained.parts) == 23 and len(said) == 1 and "3.png" in said[0]


class TestBadInput:
    def test_data(self, folder: Path, tmp_path: Path, capsys) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "one" / "cat").mkdir(parents=True)
        (tmp_path / "few" / "cat").mkdir(parents=True)
        (tmp_path / "few" / "dog").mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "one" / "cat" / f"{i}.png")
            Image.new("RGB", (8, 8)).save(tmp_path / "few" / "cat" / f"{i}.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "few" / "dog" / "0.png")
        for data, message in (
            ("nowhere", "nowhere.* nothing is there"),
            ("empty", "expected a sub-folder for each class, got none"),
            ("one", "expected pictures of 2 classes or more, got 1 .'cat'."),
            ("few", "expected 3 pictures or more of every class, got fewer of 'dog'"),
        ):
            said = call(
                capsys, "train-classes", "--data", tmp_path / data, "--out", tmp_path / "out"
            )
            assert_refused(said, message)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--size", 30], "a side that the patches of 8 divide, got 30 pixels"),
            (["--width", 30], "a width that 4 heads divide, got 30"),
            (["--held-out", 1], "expected a share above 0 and below 1"),
            (["--learning-rate", 0], "expected a learning_rate above 0, got 0.0"),
            (["--crop", 1], "expected crop from 0 to below 1, got 1.0"),
            (["--steps", 0], "--steps: expected a whole number"),
            (["--classes", "a,b"], "does not know the classes"),
            (["--vae", "nowhere"], "directory or hub id of a vae, got 'nowhere'"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "refused",
    )
    def test_options(self, options: list, message: str, folder, tmp_path: Path, capsys) -> None:
        out = tmp_path / "out"
        said = call(capsys, "train-classes", "--data", folder, "--out", out, *options)
        assert_refused(said, message)
        assert not out.exists()

    def test_autoencoders(self, folder: Path, tmp_path: Path) -> None:
        tiny_vae(channels=1).save_pretrained(tmp_path / "grey")
        tiny_vae(channels=4).save_pretrained(tmp_path / "four")
        tiny_vae().save_pretrained(tmp_path / "colour")
        (tmp_path / "empty").mkdir()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.json").write_text('{"_class_name": "VQModel"}')
        for vae, message in (
            ("grey", "takes pictures of 1 channels, but they have 3"),
            ("four", "of pictures of 1 or 3 channels in .*, got 4"),
            ("empty", "expected config.json in .* or its folder vae, found none"),
            ("other", "expected a AutoencoderKL or .* or AutoencoderTAEF2 in .*, got 'VQModel'"),
        ):
            with pytest.raises(ModelError, match=message):
                train(folder, tmp_path / "out", vae=tmp_path / vae)
        odd = dataclasses.replace(TINY, image_size=9)
        with pytest.raises(ModelError, match="size that the autoencoder's 2 pixels a latent"):
            train(folder, tmp_path / "out", odd, vae=tmp_path / "colour")
        with pytest.raises(DiveFastError, match="the patches of 3 divide, got 4 latents"):
            three = dataclasses.replace(TINY, patch_size=3)
            train(folder, tmp_path / "out", three, vae=tmp_path / "colour")
        assert not (tmp_path / "out").exists()

    def test_arguments(self, folder: Path, tmp_path: Path) -> None:
        for changes, message in (
            ({"objective": "edm"}, "expected an objective of ddpm, flow, x0, got 'edm'"),
            ({"layers": 0}, "expected layers of 1 or more, got 0"),
            ({"label_dropout": 0.0}, "a share above 0 and below 1 as label_dropout, got 0.0"),
            ({"augmentation": Augmentation(colour=-1)}, "expected colour from 0 to below 1"),
        ):
            with pytest.raises(DiveFastError, match=message):
                train(folder, tmp_path / "out", dataclasses.replace(TINY, **changes))
        with pytest.raises(DataError, match="does not know the classes"):
            train(folder, tmp_path / "out", classes=["a", "b", "c"])
