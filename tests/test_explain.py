"""Maps of where a class explains a picture better than another: values, noise and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Said, assert_refused, call
from PIL import Image
from tiny import NAMES, write_model

from dive_fast import DiffusionClassifier, DiveFastError, ProbeList
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.predict.explaining import NoOtherClass
from dive_fast.predict.explanation import Explanation, groups_of
from dive_fast.predict.overlay import BLUE, RED


@pytest.fixture(scope="module")
def clf(dit_dir: Path) -> DiffusionClassifier:
    return DiffusionClassifier.from_pretrained(dit_dir)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Of odd sides and of the model's own."""
    draw = np.random.default_rng(0).integers
    return [Image.fromarray(draw(0, 256, shape, np.uint8)) for shape in ((21, 17), (8, 8), (9, 30))]


def errors(clf: DiffusionClassifier, x0: torch.Tensor, c: int, probes: ProbeList) -> torch.Tensor:
    """The squared error of class c on each probe, pixel by pixel, [K, h, w]: plain arithmetic."""
    maps = []
    for k, t in enumerate(probes.timesteps):
        eps = probes.noise[probes.noise_index[k]]
        x_t = clf.model.schedule.a[t] * x0 + clf.model.schedule.s[t] * eps
        with torch.no_grad():
            predicted = clf.model.predict(x_t[None], t[None], clf.model.vocabulary.table[[c]])
        weight = 1.0 if probes.weights is None else probes.weights[k]
        maps.append(weight * (predicted[0] - eps).square().mean(dim=0))
    return torch.stack(maps)


# -- values ----------------------------------------------------------------------------------------


def test_error_maps_are_plain_arithmetic(clf, pictures) -> None:
    plain = low_discrepancy_probes(7, 1000, (1, 8, 8), 3)
    probes = ProbeList(plain.timesteps, plain.noise, weights=torch.arange(1.0, 8), unit=2)
    maps = clf.error_maps(pictures, [3, 1], probes)
    assert maps.shape == (3, 2, 8, 8) and maps.dtype == torch.float32
    for i, x0 in enumerate(clf.encode(pictures)):
        for j, c in enumerate((3, 1)):
            expected = errors(clf, x0, c, probes).mean(dim=0)
            torch.testing.assert_close(maps[i, j], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_their_mean_is_the_loss(clf, pictures, loss) -> None:
    maps = clf.error_maps(pictures, probes=5, seed=4, loss=loss)
    losses = clf.losses(pictures, probes=5, seed=4, loss=loss).mean(-1)
    torch.testing.assert_close(maps.mean(dim=(2, 3)), losses)


def test_an_explanation_is_plain_arithmetic(clf, pictures) -> None:
    """Ten probes are five pairs, of which each is a group."""
    found = clf.explain(pictures, "star", 1, probes=11, seed=2)
    probes = low_discrepancy_probes(11, 1000, (1, 8, 8), 2)
    for one, x0 in zip(found, clf.encode(pictures), strict=True):
        by_probe = (errors(clf, x0, 1, probes) - errors(clf, x0, 2, probes))[:10]
        pairs = by_probe.unflatten(0, (5, 2)).mean(dim=1)
        torch.testing.assert_close(one.difference, pairs.mean(dim=0), rtol=1e-3, atol=1e-6)
        spread = pairs.std(dim=0) / math.sqrt(5)
        torch.testing.assert_close(one.standard_error, spread, rtol=1e-3, atol=1e-6)
        assert one.gap == pytest.approx(pairs.mean().item(), rel=1e-3, abs=1e-6)
        means = pairs.mean(dim=(1, 2))
        assert one.gap_standard_error == pytest.approx(means.std().item() / 5**0.5, rel=1e-3)
        assert (one.a, one.b, one.n_probes, one.evaluations) == ("star", "square", 10, 20)
        assert one.picture.size == (8, 8)
    seen = np.asarray(found[1].picture)
    assert np.array_equal(seen, np.asarray(pictures[1]))


def test_latents_and_several_channels(latent_dit_dir: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(latent_dit_dir)
    x0 = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    probes = low_discrepancy_probes(4, 1000, (2, 4, 4), 0)
    for one, latent in zip(clf.explain(latents=x0, a=0, b=[1, 3], probes=4), x0, strict=True):
        b = NAMES.index(one.b)
        expected = (errors(clf, latent, b, probes) - errors(clf, latent, 0, probes)).mean(dim=0)
        torch.testing.assert_close(one.difference, expected, rtol=1e-3, atol=1e-6)
        assert one.picture is None and one.image(size=100).size == (100, 100)


def test_what_is_not_said_is_the_answer_and_the_runner_up(clf, pictures) -> None:
    answers = clf(pictures, strategy="enumerate", seed=5)
    found = clf.explain(pictures, strategy="enumerate", seed=5, probes=4)
    assert [(one.a, one.b) for one in found] == [
        tuple(entry["label"] for entry in answer.top(2)) for answer in answers
    ]
    found = clf.explain(pictures, a="cross", strategy="enumerate", seed=5, probes=4)
    for one, answer in zip(found, answers, strict=True):
        best = [entry["label"] for entry in answer.top(4) if entry["label"] != "cross"]
        assert (one.a, one.b) == ("cross", best[0])
    with pytest.raises(NoOtherClass, match="itself: compare with another"):
        clf.explain(pictures[0], b=answers[0].label, strategy="enumerate", seed=5)


def test_several_prompts_are_averaged(sd: Path, pictures) -> None:
    prompts = {"cat": ["a cat", "two cats"], "dog": ["a dog", "two dogs"]}
    clf = DiffusionClassifier.from_pretrained(sd, classes=prompts, average="loss")
    (found,) = clf.explain(pictures[0], "cat", "dog", probes=4)
    assert found.evaluations == 2 * 4 * 2 and found.groups.shape == (2, *clf.model.latent_shape[1:])
    cat, dog = clf.losses(pictures[0], probes=4).mean(-1)[0].tolist()
    assert found.gap == pytest.approx(dog - cat, rel=1e-3, abs=1e-6)


# -- its noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "unit", "sizes"),
    [(64, 2, [4] * 16), (7, 2, [2] * 3), (1, 2, [1]), (17, 1, [2] + [1] * 15), (7, 3, [3, 3])],
)
def test_groups_are_of_whole_units(k, unit, sizes) -> None:
    groups = groups_of(ProbeList(torch.arange(k), torch.zeros(k, 1, 1, 1), unit=unit))
    assert list(map(len, groups)) == sizes
    assert torch.cat(groups).tolist() == list(range(sum(sizes)))


def test_unequal_groups_weigh_as_many_probes_as_they_have() -> None:
    groups = torch.tensor([1.0, 4.0])[:, None, None].expand(2, 3, 5)
    found = Explanation(groups, (4, 2), "a", "b", 12)
    # (4 * 1 + 2 * 4) / 6; 2 / 1 ((4/6)^2 (1 - 2)^2 + (2/6)^2 (4 - 2)^2)
    assert found.difference.equal(torch.full((3, 5), 2.0))
    error = math.sqrt(2 * (4 / 9 + 4 / 9))
    torch.testing.assert_close(found.standard_error, torch.full((3, 5), error))
    torch.testing.assert_close(found.smoothed()[1], torch.full((3, 5), error))
    assert found.gap_standard_error == pytest.approx(error)
    assert not found.significant().any() and found.significant(z=1).all()


def test_of_one_group_no_error_is_known() -> None:
    found = Explanation(torch.ones(1, 2, 3), (1,), "a", "b", 2)
    assert found.standard_error.isnan().all() and math.isnan(found.gap_standard_error)
    assert not found.significant(z=0).any()


def test_noise_is_significant_at_the_rate_that_is_said() -> None:
    groups = torch.randn(16, 64, 64, generator=torch.Generator().manual_seed(0))
    share = Explanation(groups, (4,) * 16, "a", "b", 128).significant().double().mean()
    assert 0.02 < share < 0.12  # 6.4% of Student's t with 15 degrees of freedom
    sure = Explanation(groups + 3, (4,) * 16, "a", "b", 128)
    assert sure.significant().all()


# -- its drawing -----------------------------------------------------------------------------------


def test_what_is_within_noise_stays_grey() -> None:
    """Left sure, right within noise, on a white picture of another size."""
    groups = torch.full((2, 16, 16), 1.0)
    groups[:, :, 8:] = torch.tensor([3.0, -5.0])[:, None, None]
    found = Explanation(groups, (2, 2), "a", "b", 8)
    image = np.asarray(found.image(Image.new("L", (50, 30), 255), size=60)).astype(float)
    assert image.shape == (60, 60, 3)
    assert np.abs(image[30, -1] - 191.5).max() <= 1
    assert np.abs(image[30, 0] - (0.15 * 191.5 + 0.85 * np.array(RED))).max() <= 2
    everywhere = np.asarray(found.image(size=60, z=None)).astype(float)
    assert np.abs(everywhere[30, -1] - (0.15 * 191.5 + 0.85 * np.array(BLUE))).max() <= 2


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": "heart"}, "expected a class of 'circle', 'square', 'star', 'cross'.*got 'heart'"),
        ({"a": 4}, r"a row in \[0, 4\), got 4"),
        ({"a": -1}, "got -1"),
        ({"a": True}, "got True"),
        ({"b": 1.0}, "got 1.0"),
        ({"a": ["star", "cross"]}, "expected a class for each of 1 images, got 2"),
        ({"a": "star", "b": 2}, "expected two classes to compare, got 'star' twice"),
        ({"probes": 0}, "the number of probes must be at least 1"),
        ({"strategy": "guess"}, "expected a strategy of"),
        ({"images": None}, "expected either images or latents"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, "expected either images or latents"),
        ({"images": None, "latents": torch.zeros(1, 1, 8, 9)}, "latents must have shape"),
    ],
)
def test_bad_input(clf, pictures, given, message) -> None:
    with pytest.raises(DiveFastError, match=message):
        clf.explain(**{"images": pictures[0], **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": [4]}, "classes must lie in"),
        ({"probes": 0}, "the number of probes"),
        ({"loss": "l3"}, "expected a loss of"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_input_of_maps(clf, pictures, given, message) -> None:
    with pytest.raises(DiveFastError, match=message):
        clf.error_maps(pictures[0], **given)


def test_classes_that_the_model_cannot_tell_apart(tmp_path: Path, pictures) -> None:
    clf = DiffusionClassifier.from_pretrained(write_model(tmp_path / "dit"))
    clf.model.vocabulary.table[2] = clf.model.vocabulary.table[0]
    with pytest.raises(DiveFastError, match="'circle' and 'star' of the same embedding"):
        clf.explain(pictures[0], "circle", "star")
    (found,) = clf.explain(pictures[0], "circle", probes=2, strategy="enumerate")
    assert found.b in ("square", "cross")


@pytest.mark.parametrize("given", [{"z": -1}, {"z": "2"}, {"size": 0}, {"size": 9000}])
def test_bad_drawings(given) -> None:
    with pytest.raises(DiveFastError, match=f"{next(iter(given))} must be"):
        Explanation(torch.ones(2, 4, 4), (1, 1), "a", "b", 4).image(**given)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def explain(capsys, dit_dir: Path, tmp_path: Path, pictures):
    """The command on the pictures, in two folders of which each has a 0.png."""
    paths = [tmp_path / "0.png", tmp_path / "more" / "0.png", tmp_path / "more" / "2.png"]
    paths[1].parent.mkdir()
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)

    def run(*more: object, images: tuple = (paths[0], paths[1].parent)) -> Said:
        common = ("--model", dit_dir, "--probes", 4, "--out", tmp_path / "maps")
        return call(capsys, "explain", *images, *common, *more)

    return run


def test_the_command_writes_maps(explain, clf, pictures, tmp_path: Path) -> None:
    said = explain("--class", "star", "--against", "1")
    assert said.code == 0 and not said.err
    lines, out = said.out.splitlines(), tmp_path / "maps"
    assert len(lines) == 3
    assert all(": star rather than square: " in line for line in lines)
    content = json.loads((out / "maps.json").read_text())
    drawn = [row["drawn"] for row in content["maps"]]
    assert drawn == ["0-star-square.png", "0-star-square-2.png", "2-star-square.png"]
    found = clf.explain(pictures, "star", "square", probes=4)
    with np.load(out / "maps.npz") as maps:
        for i, one in enumerate(found):
            assert np.allclose(maps["difference"][i], one.difference, atol=1e-6)
            assert np.allclose(maps["standard_error"][i], one.standard_error, atol=1e-6)
            assert content["maps"][i]["gap"] == pytest.approx(one.gap, abs=1e-6)
            with Image.open(out / drawn[i]) as image:
                assert image.size == one.image().size
    assert content["config"]["probes"] == 4 and content["failed"] == {}


def test_bad_pictures_are_told_and_the_rest_go_on(explain, tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.png", tmp_path / "0.png"
    bad.write_text("no image")
    said = explain(images=(bad, tmp_path / "missing.png", good))
    assert said.code == 2 and "Traceback" not in said.err
    assert len(said.out.splitlines()) == 1 and len(said.err.splitlines()) == 2
    content = json.loads((tmp_path / "maps" / "maps.json").read_text())
    assert len(content["maps"]) == 1 and len(content["failed"]) == 2


def test_an_answer_that_is_the_other_class_is_told(explain, tmp_path: Path) -> None:
    answers = explain().out.splitlines()
    label = answers[0].partition(": ")[2].partition(" rather")[0]
    said = explain("--against", label, "--out", tmp_path / "own", images=(tmp_path / "0.png",))
    assert_refused(said, f"0.png: the answer is '{label}' itself")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--class", "heart"), "expected a class of .* got 'heart'"),
        (("--against", "9"), r"a row in \[0, 4\), got 9"),
        (("--class", "star", "--against", "2"), "expected two classes to compare, got 'star'"),
        (("--strategy", "guess"), "expected a strategy of"),
    ],
)
def test_bad_options(explain, tmp_path: Path, arguments, message) -> None:
    assert_refused(explain(*arguments), message)
    assert not (tmp_path / "maps").exists()


def test_out_is_a_file(explain, tmp_path: Path) -> None:
    (tmp_path / "maps").write_text("")
    assert_refused(explain(), "maps: expected a directory, got a file")


def test_a_detector(layout_dir: Path, capsys, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    arguments = ("--model", layout_dir, "--out", tmp_path / "maps")
    said = call(capsys, "explain", tmp_path / "0.png", *arguments)
    assert_refused(said, "expected a model of classes, got the layout-to-image model")
