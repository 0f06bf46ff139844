"""Weights of pixels: what is accepted, and that they go where the picture's pixels go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dive_fast.data.images import center_crop, crop_box
from dive_fast.data.pixel_weights import as_pixel_weights, cropped, on_grid
from dive_fast.errors import ImageError

SIZES = ((16, 16), (64, 64), (100, 37), (37, 100), (333, 250), (5, 9), (1, 1), (23, 24))


def ones(size: tuple[int, int]) -> torch.Tensor:
    return torch.ones(size[1], size[0], dtype=torch.float64)


@pytest.mark.parametrize("size", [size for size in SIZES if size != (1, 1)])
def test_the_box_is_what_the_crop_keeps(size):
    """A ramp's values within the crop tell where its pixels came from."""
    left, top, right, bottom = crop_box(size, 16)
    assert 0 <= left < right <= size[0] + 1e-9 and 0 <= top < bottom <= size[1] + 1e-9
    for axis, (low, high) in enumerate(((left, right), (top, bottom))):
        ramp = np.arange(size[axis], dtype=np.float32)[None].repeat(size[1 - axis], 0)
        picture = Image.fromarray(ramp if axis == 0 else ramp.T.copy())
        line = np.asarray(center_crop(picture, 16)).mean(axis=axis)
        # Centres of pixels. The filters bend a ramp at the picture's edges, and where an odd side
        # is halved they take whole pixels only.
        expected = low + (high - low) * (np.arange(16) + 0.5) / 16 - 0.5
        assert np.abs(line[4:12] - expected[4:12]).max() < 0.25 * (high - low) / 16


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_over_areas(size):
    weights = torch.rand(size[1], size[0], generator=torch.Generator().manual_seed(0)).double()
    found, grid, fine = on_grid(weights, 16, (4, 8)), (4, 8), 320
    left, top, right, bottom = crop_box(size, 16)
    # Sampled so densely that the sum is the area.
    y = top + (bottom - top) * (torch.arange(fine).double() + 0.5) / fine
    x = left + (right - left) * (torch.arange(fine).double() + 0.5) / fine
    dense = (weights / weights.max())[y.long()[:, None], x.long()]
    expected = dense.unflatten(0, (4, -1)).unflatten(2, (8, -1)).mean(dim=(1, 3))
    if found is None:
        assert size == (1, 1) and grid == (4, 8)
    else:
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=0.02)


def test_whole_pixels_stay_as_they_are():
    weights = torch.rand(28, 28, dtype=torch.float64)
    weights[3, 4] = 1
    assert torch.equal(on_grid(weights, 28, (28, 28)), (weights / weights.max()).float())


@pytest.mark.parametrize("size", SIZES)
def test_equal_weights_are_none(size):
    assert on_grid(0.3 * ones(size), 16, (8, 8)) is None


def test_large_weights():
    weights = ones((8, 8)) * 1e308
    weights[0] = 0
    expected = torch.ones(4, 4)
    expected[0] = 0.5
    assert torch.equal(on_grid(weights, 8, (4, 4)), expected)


def test_what_counts_as_weights(tmp_path):
    grey = np.zeros((3, 4), dtype=np.uint8)
    grey[1, 2] = 255
    grey[0, 0] = 51
    for given in (Image.fromarray(grey), grey / 255, torch.from_numpy(grey) / 255):
        found = as_pixel_weights(given, (4, 3))
        assert found.dtype == torch.float64 and found[1, 2] == 1
        assert found[0, 0].item() == pytest.approx(0.2)
    found = as_pixel_weights(grey > 60, (4, 3))
    assert found.sum() == 1 and found[1, 2] == 1
    assert as_pixel_weights(grey.tolist(), (4, 3)).max() == 255
    # A picture is turned upright; its weights lie as it does then.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=exif)
    assert as_pixel_weights(tmp_path / "turned.png", (3, 4))[2, 1] == 1


BAD = [
    (np.ones((4, 3)), "own size, 4 x 3, got 3 x 4"),
    (np.ones(12), r"own size, 4 x 3, got \[12\]"),
    (np.zeros((3, 4)), "zeros only"),
    (np.full((3, 4), np.inf), "finite and at least 0, got inf"),
    (np.full((3, 4), -1e-9), "at least 0, got -1e-09"),
    (np.ones((3, 4), dtype=complex), "as numbers"),
    ([[1, 2], [3]], "as numbers"),
    (np.array([["a"]]), "as numbers"),
    (torch.ones(3, 4).to_sparse(), "as numbers"),
    (object(), "as numbers"),
]


@pytest.mark.parametrize("given, message", BAD)
def test_what_does_not(given, message):
    with pytest.raises(ImageError, match=message) as told:
        as_pixel_weights(given, (4, 3))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("size", SIZES)
def test_cropped_before_or_after(size):
    """A picture and its weights may be cropped beforehand: it comes to the same."""
    picture = Image.fromarray(np.arange(size[0] * size[1]).reshape(size[::-1]).astype(np.uint8))
    weights = torch.rand(size[1], size[0], generator=torch.Generator().manual_seed(0)).numpy()
    small, left = cropped(picture, weights, 16, 3)
    assert small.size == (16, 16) and small.mode == "RGB"
    expected = on_grid(as_pixel_weights(weights, size), 16, (4, 8))
    if expected is None:
        assert left is None
    else:
        found = on_grid(as_pixel_weights(left, (16, 16)), 16, (4, 8))
        torch.testing.assert_close(found / found.mean(), expected / expected.mean())
    assert cropped(picture, None, 16, 1)[1] is None


def test_nothing_within_the_crop():
    weights = ones((60, 20))
    weights[:, 15:] = 0
    with pytest.raises(ImageError, match="central square"):
        on_grid(weights, 16, (8, 8))
