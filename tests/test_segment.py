"""Segmentation by error maps: against exact posteriors of places, of classes and of layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_layout import SCENE, PictureModel
from toy_model import ToyModel

from dive_fast import Detections, DiffusionClassifier, LayoutDetector, Segmentation
from dive_fast.core.probes import ProbeList
from dive_fast.core.segmentation import SegmentationRule
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.predict.segmentation import BACKGROUND


class PixelModel(ToyModel):
    """Of every class each place is a Gaussian of its own, so that each has an exact posterior."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :2]

    @property
    def means(self) -> torch.Tensor:
        return self.toy.table.view(-1, *self.toy.shape)


@pytest.fixture
def clf() -> DiffusionClassifier:
    return DiffusionClassifier(PixelModel(n_classes=4))


@pytest.fixture
def x0(clf) -> torch.Tensor:
    """Each place drawn from a class of its own."""
    generator = torch.Generator().manual_seed(1)
    which = torch.randint(4, (3, 1, 1, 3, 3), generator=generator).expand(3, 1, 2, 3, 3)
    means = clf.model.means[None].expand(3, -1, -1, -1, -1).gather(1, which)[:, 0]
    return means + 0.5 * torch.randn(means.shape, generator=generator)


def one_step(t: int = 400, pairs: int = 3) -> ProbeList:
    """Antithetic pairs at one timestep: what the noise adds to a class's error cancels."""
    noise = torch.randn(pairs, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    both = torch.stack([noise, -noise], dim=1).flatten(0, 1)
    return ProbeList(torch.full((2 * pairs,), t), both, unit=2)


def exact_gamma(clf, t: int = 400) -> float:
    """What makes -gamma E the log-density: E_c = (a s / V)^2 mean over channels of (x0 - mu)^2."""
    a, s, sigma = clf.model.schedule.a[t], clf.model.schedule.s[t], clf.model.toy.sigma
    variance = a**2 * sigma**2 + s**2
    return float(2 / (2 * sigma**2) / (a * s / variance) ** 2)


def exact_posterior(clf, x0: torch.Tensor, rows: list[int]) -> torch.Tensor:
    squares = (x0[:, None] - clf.model.means[rows]).double().square().sum(dim=2)
    return (-squares / (2 * clf.model.toy.sigma**2)).softmax(dim=1)


# -- classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 1]])
def test_the_exact_posterior_of_every_place(clf, x0, rows) -> None:
    rule = SegmentationRule(exact_gamma(clf))
    found = clf.segment(latents=x0, classes=rows, rule=rule, probes=one_step())
    expected = exact_posterior(clf, x0, rows)
    for one, posterior in zip(found, expected, strict=True):
        torch.testing.assert_close(one.posterior.double(), posterior, rtol=1e-3, atol=1e-4)
        assert one.labels.equal(posterior.argmax(dim=0)) and one.labels.dtype == torch.int64
        assert one.names == tuple(f"class {c}" for c in rows) and one.background is None
        assert one.evaluations == 6 * len(rows) and one.picture is None


def test_no_class_competes(clf, x0) -> None:
    """The null condition of the toy is the mean of the means, with the rule's log-odds."""
    rule = SegmentationRule(exact_gamma(clf), background=0.7)
    (one, *_) = clf.segment(latents=x0, background=True, rule=rule, probes=one_step())
    means = torch.cat([clf.model.means, clf.model.means.mean(dim=0, keepdim=True)])
    scores = -(x0[0] - means).double().square().sum(dim=1) / (2 * clf.model.toy.sigma**2)
    scores[-1] += 0.7
    torch.testing.assert_close(one.posterior.double(), scores.softmax(0), rtol=1e-3, atol=1e-4)
    assert one.names[-1] == BACKGROUND and one.background == 4


def test_a_window_as_the_classifier_judges_an_image(clf, x0) -> None:
    """A Gaussian as wide as the image: every place has nearly the image's own posterior."""
    loss = clf.losses(latents=x0, probes=one_step()).mean(-1).double()
    rule = SegmentationRule(9.0, sigma=1.0)
    for one, row in zip(clf.segment(latents=x0, rule=rule, probes=one_step()), loss, strict=True):
        expected = (-9.0 * row).softmax(dim=0)[:, None, None].expand(-1, 3, 3)
        torch.testing.assert_close(one.posterior.double(), expected, rtol=0.05, atol=0.01)
    # 4 pi sigma^2 places of 3 x 3 are worth more than one from 1/11 of the sides on.
    assert SegmentationRule.for_model(9.0, (3, 3), 0.05).gamma == pytest.approx(1.0)
    wide = SegmentationRule.for_model(9.0, (3, 3), 0.5)
    assert wide.gamma == pytest.approx(4 * math.pi * 0.25 * 9)


def test_a_batch_is_its_images(clf, x0) -> None:
    together = clf.segment(latents=x0, probes=10)
    for i, one in enumerate(together):
        (alone,) = clf.segment(latents=x0[i : i + 1], probes=10)
        torch.testing.assert_close(alone.posterior, one.posterior, rtol=1e-4, atol=1e-5)


def test_pictures_of_odd_sizes(dit_dir: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(dit_dir)
    draw = np.random.default_rng(0).integers
    pictures = [Image.fromarray(draw(0, 256, size, np.uint8)) for size in ((21, 17), (8, 8))]
    found = clf.segment(pictures, ["star", 0], probes=4)
    for one, maps in zip(found, clf.error_maps(pictures, [2, 0], probes=4), strict=True):
        assert one.labels.shape == (8, 8) and one.picture.size == (8, 8)
        assert one.names == ("star", "circle")
        rule = SegmentationRule.for_model(clf.model.inverse_temperature, (8, 8), 1 / 16)
        expected = rule.scores(-maps, background=False).softmax(dim=0)
        torch.testing.assert_close(one.posterior.double(), expected, rtol=1e-3, atol=1e-4)
    streamed = dict(clf.segment_stream(enumerate(pictures), ["star", 0], probes=4))
    for i, one in enumerate(found):
        torch.testing.assert_close(streamed[i].posterior, one.posterior)


def test_maps_of_latents_are_enlarged(latent_dit_dir: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(latent_dit_dir)
    (one,) = clf.segment(np.full((9, 13), 70, np.uint8), probes=2)
    assert one.labels.shape == tuple(clf.model.image_shape[1:]) != clf.model.latent_shape[1:]
    torch.testing.assert_close(one.posterior.sum(dim=0), torch.ones(one.labels.shape))


def test_the_fit_finds_the_exact_rule(clf) -> None:
    """Masks that the places were drawn by: gamma is that of the densities, without a window."""
    generator = torch.Generator().manual_seed(3)
    which = torch.randint(4, (400, 1, 1, 3, 3), generator=generator)
    means = clf.model.means[None].expand(400, -1, -1, -1, -1)
    x0 = means.gather(1, which.expand(-1, 1, 2, 3, 3))[:, 0]
    x0 = x0 + 0.5 * torch.randn(x0.shape, generator=generator)
    masks = which[:, 0, 0].numpy().astype(np.int32)
    masks[0, 0, 0] = -1
    fit = clf.fit_segmentation(None, masks, latents=x0, probes=one_step())
    # A Gaussian of 1/16 of three places is none.
    assert fit.rule.sigma <= 1 / 16 and fit.rule.background == 0 and fit.places == 400 * 9 - 1
    assert fit.rule.gamma == pytest.approx(exact_gamma(clf), rel=0.1)
    right = exact_posterior(clf, x0, [0, 1, 2, 3]).argmax(1) == torch.from_numpy(masks)
    assert fit.right_after == pytest.approx(right.double().mean().item(), abs=0.01)
    assert fit.log_likelihood_after > fit.log_likelihood_before and "places right" in str(fit)
    assert clf.model.segmentation is fit.rule
    assert clf.segment(latents=x0[:1], probes=one_step())[0].posterior.isfinite().all()


def test_what_was_fitted_is_kept(dit_dir: Path, tmp_path: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(dit_dir)
    clf.model.segmentation = SegmentationRule(3.0, 0.25, -1.5)
    clf.save_fitted(tmp_path)
    other = DiffusionClassifier.from_pretrained(dit_dir)
    other.load_fitted(tmp_path)
    assert other.model.segmentation == clf.model.segmentation
    content = json.loads((tmp_path / "dive_fast.json").read_text())
    assert content["segmentation"] == {"gamma": 3.0, "sigma": 0.25, "background": -1.5}
    for bad in ({"gamma": 1.0}, {"gamma": -1, "sigma": 0, "background": 0}, [], "x"):
        (tmp_path / "dive_fast.json").write_text(json.dumps({**content, "segmentation": bad}))
        with pytest.raises(ModelError, match="segmentation in .* cannot be used"):
            other.load_fitted(tmp_path)


# -- layouts ---------------------------------------------------------------------------------------


@pytest.fixture
def detector() -> LayoutDetector:
    return LayoutDetector(PictureModel())


def boxes_of(scene) -> torch.Tensor:
    return torch.tensor([list(item.box) for item in scene], dtype=torch.float32)


def test_objects_of_the_toy_are_found_place_by_place(detector) -> None:
    """The toy fills its boxes, so its masks are the boxes; found by search, odd image sizes."""
    (picture,) = detector.model.draw(SCENE)
    wide = picture.resize((60, 30), Image.Resampling.NEAREST)
    truth = torch.full((6, 6), 3)
    for item in SCENE:
        truth[item.box.top : item.box.bottom, item.box.left : item.box.right] = item.class_id
    small, large = detector.segment([picture, wide], rule=SegmentationRule(100.0))
    assert small.labels.equal(truth) and small.names[-1] == BACKGROUND and small.background == 3
    assert large.labels.shape == (30, 60) and large.picture.size == (60, 30)
    assert large.labels[2::5, 5::10].equal(truth)


def test_evidence_is_plain_arithmetic(detector) -> None:
    """A place that is dark within a box is background: the layout without the object is right."""
    (picture,) = detector.model.draw(SCENE)
    dark = np.asarray(picture).copy()
    dark[4, 4] = 0
    table = torch.tensor([[0.1, 0.6, 0.1], [0.0, 0.0, 0.9]])
    given = Detections(boxes_of(SCENE), [1, 2], [0.6, 0.9], detector.names, table)
    rule = SegmentationRule(0.3, background=0.4)
    (found,) = detector.segment(dark, detections=[given], rule=rule, map_probes=6)
    assert found.evaluations == 6 * 3
    ratio = detector.model.schedule.a.double() ** 2 / detector.model.schedule.s.double() ** 2
    probes = detector.probe_list(_guided(detector))
    factor = float(ratio[probes.timesteps[:6]].mean())
    x0 = torch.from_numpy(dark).permute(2, 0, 1).double() / 255
    q = torch.zeros(3, 6, 6, dtype=torch.float64)
    for i, item in enumerate(SCENE):
        box = item.box
        lit = torch.zeros(3, dtype=torch.float64)
        lit[item.class_id] = 1
        # E = (a / s)^2 mean over channels of (x0 - picture of the layout)^2
        gain = (x0.square() - (x0 - lit[:, None, None]).square()).mean(dim=0) * factor
        inside = torch.zeros(6, 6, dtype=torch.bool)
        inside[box.top : box.bottom, box.left : box.right] = True
        q[i] = (0.3 * gain).exp() * inside
    q[2] = math.exp(0.4)
    q = q / q.sum(dim=0)
    expected = torch.einsum("nhw,nc->chw", q[:2], table.double())
    torch.testing.assert_close(found.posterior[:3].double(), expected, rtol=1e-3, atol=1e-4)
    assert found.labels[4, 4] == 3


def test_a_picture_without_objects(detector) -> None:
    (found,) = detector.segment(np.zeros((7, 5, 3), np.uint8))
    assert found.labels.eq(3).all() and found.areas[BACKGROUND] == 1


def test_scenes_one_by_one_as_together(detector) -> None:
    pictures = detector.model.draw(SCENE, SCENE[:1])
    together = detector.segment(pictures)
    for picture, one in zip(pictures, together, strict=True):
        (alone,) = detector.segment(picture)
        torch.testing.assert_close(alone.posterior, one.posterior, rtol=1e-4, atol=1e-5)


def test_a_detector_is_fitted_to_masks(detector) -> None:
    """Boxes with a hole each, which the masks call background."""
    (picture,) = detector.model.draw(SCENE)
    image, mask = np.asarray(picture).copy(), np.full((6, 6), 3)
    for item in SCENE:
        box = item.box
        mask[box.top : box.bottom, box.left : box.right] = item.class_id
    image[4, 4], mask[4, 4] = 0, 3
    mask[0, 0] = -1
    given = Detections(boxes_of(SCENE), [1, 2], [1, 1], detector.names)
    fit = detector.fit_segmentation([image], [mask], detections=[given])
    assert fit.right_after == 1 and fit.places == 35
    assert fit.rule is detector.model.segmentation
    (found,) = detector.segment(image, detections=[given])
    assert found.labels.flatten()[1:].tolist() == mask.flatten()[1:].tolist()


def _guided(detector):
    from dive_fast.strategies.layout import resolve_layout_strategy

    return resolve_layout_strategy(None, {})


# -- the answer ------------------------------------------------------------------------------------


def test_drawings_and_sizes() -> None:
    posterior = torch.zeros(3, 2, 3)
    posterior[0, :, 0] = posterior[1, :, 1] = posterior[2, :, 2] = 1
    found = Segmentation(posterior, ("cat", "dog", BACKGROUND), 2, 5, 0.5)
    assert found.labels.tolist() == [[0, 1, 2]] * 2
    assert found.areas == pytest.approx({"cat": 1 / 3, "dog": 1 / 3, BACKGROUND: 1 / 3})
    image = found.label_image()
    assert image.mode == "P" and np.asarray(image).tolist() == [[0, 1, 2]] * 2
    assert image.getpalette()[6:9] == [0, 0, 0] and any(image.getpalette()[:3])
    drawn = np.asarray(found.draw(Image.new("L", (9, 4), 255), size=6))
    assert drawn.shape == (4, 6, 3)
    assert np.ptp(drawn[0, -1]) == 0 and np.ptp(drawn[0, 0].astype(int)) > 50
    larger = found.resized(9, 4)
    assert larger.labels[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    torch.testing.assert_close(larger.posterior.sum(dim=0), torch.ones(4, 9))
    many = Segmentation(torch.full((300, 1, 2), 1 / 300), tuple(map(str, range(300))))
    assert many.label_image().mode.startswith("I;16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"posterior": torch.ones(2, 3)}, r"posterior must be floats \[C, h, w\]"),
        ({"posterior": torch.ones(2, 1, 1)}, "sum to 1"),
        ({"posterior": torch.full((2, 1, 1), math.nan)}, "sum to 1"),
        ({"names": ("a",)}, "expected a name for each class"),
        ({"background": 2}, "background must be at most 1"),
    ],
)
def test_bad_answers(given, message) -> None:
    with pytest.raises(DiveFastError, match=message):
        Segmentation(**{"posterior": torch.full((2, 1, 1), 0.5), "names": ("a", "b"), **given})
