"""Augmentation: what may change, how much, and what stays."""

from __future__ import annotations

import pytest
import torch

from dive_fast.training.augmentation import Augmentation


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 40, channels: int = 3, side: int = 10) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=drawn(1)) * 2 - 1


def test_the_default_changes_nothing() -> None:
    x = pictures()
    assert Augmentation()(x, drawn()) is x


def test_flips_mirror_about_half_of_the_pictures() -> None:
    x = pictures(400)
    found = Augmentation(flip=True)(x, drawn())
    same = (found == x).flatten(1).all(dim=1)
    mirrored = (found == x.flip(3)).flatten(1).all(dim=1)
    assert (same ^ mirrored).all() and 150 < mirrored.sum() < 250


def test_crops_are_parts_of_the_picture() -> None:
    """Of a ramp from -0.8 to 0.8 a part of 1 - crop to 1 of its width is seen."""
    side = 32
    ramp = torch.linspace(-0.8, 0.8, side).expand(200, 1, side, side)
    found = Augmentation(crop=0.5)(ramp, drawn())
    # Away from the border, where pixels are repeated.
    step = (found[:, 0, 16, 20] - found[:, 0, 16, 12]) / (ramp[0, 0, 0, 20] - ramp[0, 0, 0, 12])
    assert 0.5 <= step.min() < 0.55 and 0.95 < step.max() <= 1.001
    assert found.min() >= -0.85 and found.max() <= 0.85
    middle = found[:, 0, 16, 15:17].mean(dim=1)
    assert middle.abs().max() <= 0.8 * 0.5 + 0.02 and abs(middle.mean()) < 0.05


def test_colours_keep_the_shapes() -> None:
    """A grey picture stays grey, and an edge an edge; values stay in their range."""
    x = torch.full((50, 3, 6, 6), -0.5)
    x[..., 3:] = 0.25
    found = Augmentation(colour=0.4)(x, drawn())
    torch.testing.assert_close(found[:, 0], found[:, 2], atol=1e-5, rtol=0)
    assert (found[..., 3:] > found[..., :3].amax()).any() and found.std() > x.std() / 2
    assert len(found[:, 0, 0, 0].unique()) == 50
    bright = Augmentation(colour=0.9)(pictures(), drawn())
    assert bright.min() >= -1 and bright.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_generator_decides(channels: int) -> None:
    change, x = Augmentation(flip=True, crop=0.3, colour=0.3), pictures(channels=channels)
    first = change(x, drawn(3))
    assert torch.equal(change(x, drawn(3)), first) and not torch.equal(change(x, drawn(4)), first)
    assert first.shape == x.shape
