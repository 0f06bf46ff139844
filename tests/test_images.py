from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dive_fast.data.images import (
    MAX_PIXELS,
    as_image,
    as_images,
    center_crop,
    image_to_tensor,
    read_image,
    to_mode,
)
from dive_fast.errors import ImageError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (21, 17), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (21, 17, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def adm_crop(array: np.ndarray, size: int) -> np.ndarray:
    """The published algorithm, stated independently: on arrays, cropping by index."""
    image = Image.fromarray(array)
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


class TestReadImage:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"nothing\.png: no such file"):
            read_image(tmp_path / "nothing.png")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="got a directory"):
            read_image(tmp_path)

    def test_name_with_nul(self) -> None:
        with pytest.raises(ImageError, match="cannot be read"):
            read_image("a\0b.png")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_pipe_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ImageError, match="device, pipe or socket"):
            read_image(tmp_path / "pipe.png")

    def test_zero_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        with pytest.raises(ImageError, match="0 bytes"):
            read_image(tmp_path / "a.png")

    @pytest.mark.parametrize("content", [b"hello, this is text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8"])
    def test_not_an_image(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ImageError, match=r"a\.png: "):
            read_image(tmp_path / "a.png")

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "gif", "webp", "ppm"])
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    def test_truncated(self, tmp_path: Path, suffix: str, share: float) -> None:
        whole = save(tmp_path / f"whole.{suffix}", RNG.integers(0, 256, (64, 64, 3), np.uint8))
        content = whole.read_bytes()
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(content[: int(len(content) * share)])
        read_image(whole)
        with pytest.raises(ImageError, match=f"cut.{suffix}: "):
            read_image(cut)

    def test_damaged_in_the_middle(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", RNG.integers(0, 256, (64, 64, 3), np.uint8))
        content = bytearray(path.read_bytes())
        content[200:300] = bytes(100)
        path.write_bytes(content)
        with pytest.raises(ImageError, match="truncated or damaged"):
            read_image(path)

    @pytest.mark.parametrize("side", [9_500, 30_000], ids=["where Pillow warns", "where it raises"])
    def test_decompression_bomb(
        self, tmp_path: Path, side: int, recwarn: pytest.WarningsRecorder
    ) -> None:
        assert side**2 > MAX_PIXELS
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n"
        for kind, data in chunks:
            crc = struct.pack(">I", zlib.crc32(kind + data))
            content += struct.pack(">I", len(data)) + kind + data + crc
        (tmp_path / "bomb.png").write_bytes(content)
        with pytest.raises(ImageError, match=f"at most {MAX_PIXELS:,} pixels"):
            read_image(tmp_path / "bomb.png")
        assert not recwarn.list  # one sentence, not two

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, tmp_path: Path, orientation: int) -> None:
        # By the EXIF standard: where the stored first row and first column lie in the image.
        stored_to_shown = {
            1: lambda a: a,
            2: lambda a: a[:, ::-1],
            3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1],
            5: lambda a: a.T,
            6: lambda a: a.T[:, ::-1],
            7: lambda a: a.T[::-1, ::-1],
            8: lambda a: a.T[::-1],
        }
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / "a.png", GREY, exif=exif)
        shown = stored_to_shown[orientation](GREY)
        np.testing.assert_array_equal(np.asarray(read_image(path)), shown)
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(as_image(image)), shown)
        # Turned once: what read_image gives is not turned again.
        np.testing.assert_array_equal(np.asarray(as_image(read_image(path))), shown)

    def test_damaged_exif_leaves_the_image(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", GREY, exif=b"Exif\0\0this is no TIFF header")
        np.testing.assert_array_equal(np.asarray(read_image(path)), GREY)


class TestToMode:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_black_and_white_survive_every_mode(self, mode: str, channels: int) -> None:
        board = np.where(np.indices((4, 6)).sum(0) % 2, 255, 0).astype(np.uint8)
        image = Image.fromarray(board)
        image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
        result = to_mode(image, channels)
        assert result.mode == ("L" if channels == 1 else "RGB")
        expected = board if channels == 1 else np.repeat(board[..., None], 3, axis=2)
        np.testing.assert_array_equal(np.asarray(result), expected)

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, ">u2"])
    def test_16_bit(self, dtype: object) -> None:
        deep = (GREY.astype(np.uint16) * 257).astype(dtype)
        image = Image.frombytes("I;16B", (17, 21), deep.tobytes()) if dtype == ">u2" else None
        image = image or Image.fromarray(deep)
        np.testing.assert_array_equal(np.asarray(to_mode(image, 1)), GREY)

    def test_16_bit_png(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", GREY.astype(np.uint16) * 257)
        np.testing.assert_array_equal(np.asarray(to_mode(read_image(path), 1)), GREY)

    def test_16_bit_rounds(self) -> None:
        deep = Image.fromarray(np.array([[0, 128, 129, 65534, 65535]], np.uint16))
        assert np.asarray(to_mode(deep, 1)).tolist() == [[0, 0, 1, 255, 255]]

    def test_float_image(self) -> None:
        image = Image.fromarray(GREY.astype(np.float32) / 255)
        np.testing.assert_array_equal(np.asarray(to_mode(image, 1)), GREY)

    @pytest.mark.parametrize("value", [-1.0, 2.0, float("nan"), float("inf")])
    def test_bad_float_image(self, value: float) -> None:
        with pytest.raises(ImageError, match="expected"):
            to_mode(Image.new("F", (3, 2), value), 1)

    @pytest.mark.parametrize("value", [-1, 65536])
    def test_bad_integer_image(self, value: int) -> None:
        with pytest.raises(ImageError, match=f"0 to 65535.*{value}"):
            to_mode(Image.new("I", (3, 2), value), 1)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_transparency_lies_on_white(self, channels: int) -> None:
        black_alpha = np.zeros((1, 3, 4), np.uint8)
        black_alpha[0, :, 3] = [0, 128, 255]
        result = np.asarray(to_mode(Image.fromarray(black_alpha), channels))
        assert result.reshape(3, channels)[:, 0].tolist() == [255, 127, 0]

    def test_transparent_palette_colour(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.save(tmp_path / "a.png", transparency=0)
        result = np.asarray(to_mode(read_image(tmp_path / "a.png"), 3))
        assert result.tolist() == [[[255, 255, 255], [40, 50, 60]]]

    def test_transparent_grey_level(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", np.array([[7, 8]], np.uint8), transparency=7)
        result = np.asarray(to_mode(read_image(tmp_path / "a.png"), 1))
        assert result.tolist() == [[255, 8]]

    @pytest.mark.parametrize("channels", [0, 2, 4])
    def test_bad_channels(self, channels: int) -> None:
        with pytest.raises(ImageError, match=f"1 or 3 channels, got {channels}.*latents="):
            to_mode(Image.new("L", (2, 2)), channels)

    @pytest.mark.parametrize("mode", ["L", "I", "F", "RGBA"])
    def test_image_without_pixels(self, mode: str) -> None:
        with pytest.raises(ImageError, match="at least 1 pixel, got 0 x 3"):
            to_mode(Image.new(mode, (0, 3)), 1)

    def test_inconvertible_mode(self) -> None:
        with pytest.raises(ImageError, match="mode La"):
            to_mode(Image.new("La", (2, 2)), 3)


class TestCenterCrop:
    @pytest.mark.parametrize("height, width", [(8, 8), (9, 8), (1, 3), (63, 65), (16, 16), (51, 7)])
    @pytest.mark.parametrize("size", [1, 8, 15])
    def test_is_the_published_crop(self, height: int, width: int, size: int) -> None:
        array = RNG.integers(0, 256, (height, width, 3), np.uint8)
        result = np.asarray(center_crop(Image.fromarray(array), size))
        np.testing.assert_array_equal(result, adm_crop(array, size))

    def test_exact_size_is_unchanged(self) -> None:
        square = GREY[:16, :16]
        np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(square), 16)), square)

    def test_long_and_thin(self) -> None:
        with pytest.raises(ImageError, match="100000 x 2 is too long and thin"):
            center_crop(Image.new("L", (100_000, 2)), 256)

    def test_bad_size(self) -> None:
        with pytest.raises(ImageError, match="size 0"):
            center_crop(Image.new("L", (4, 4)), 0)


class TestAsImages:
    def grey_forms(self, path: Path) -> list[object]:
        deep = GREY.astype(np.uint16) * 257
        unit = GREY.astype(np.float32) / 255
        return [
            save(path / "a.png", GREY),
            str(path / "a.png"),
            save(path / "deep.png", deep),
            Image.fromarray(GREY),
            GREY,
            GREY[..., None],
            np.asfortranarray(GREY),
            deep,
            deep.astype(">u2"),
            unit,
            unit.astype(np.float64),
            unit.astype(np.float16),
            torch.from_numpy(GREY),
            torch.from_numpy(GREY)[None],
            torch.from_numpy(deep)[None],
            torch.from_numpy(unit)[None].requires_grad_(),
            torch.from_numpy(unit)[None].bfloat16(),
            [GREY],
            (Image.fromarray(GREY),),
            torch.from_numpy(GREY)[None, None],
            GREY[None, ..., None],
        ]

    @pytest.mark.parametrize("size, channels", [(8, 1), (8, 3), (17, 1), (40, 3)])
    def test_one_grey_image_in_every_form(self, tmp_path: Path, size: int, channels: int) -> None:
        expected = torch.from_numpy(adm_crop(GREY, size).astype(np.float32) / 127.5 - 1)
        expected = expected.expand(channels, size, size)
        for form in self.grey_forms(tmp_path):
            (tensor,) = as_images(form, size, channels)
            assert tensor.dtype == torch.float32 and tensor.shape == (channels, size, size)
            assert torch.equal(tensor, expected), type(form)

    def test_one_colour_image_in_every_form(self, tmp_path: Path) -> None:
        opaque = np.concatenate([COLOUR, np.full((21, 17, 1), 255, np.uint8)], axis=2)
        channels_first = torch.from_numpy(COLOUR).permute(2, 0, 1)
        forms = [
            save(tmp_path / "a.png", COLOUR),
            Image.fromarray(COLOUR),
            COLOUR,
            opaque,
            COLOUR / 255,
            channels_first,
            channels_first[None] / 255,
            torch.from_numpy(opaque).permute(2, 0, 1),
        ]
        expected = torch.from_numpy(adm_crop(COLOUR, 8).astype(np.float32) / 127.5 - 1)
        for form in forms:
            (tensor,) = as_images(form, 8, 3)
            assert torch.equal(tensor, expected.permute(2, 0, 1))

    def test_range(self) -> None:
        tensor = image_to_tensor(Image.fromarray(np.array([[0, 255]], np.uint8)), 1, 1)
        assert tensor.item() == -1.0
        assert image_to_tensor(Image.new("L", (1, 1), 255), 1, 1).item() == 1.0

    @pytest.mark.parametrize("n", [1, 3, 5])
    def test_batches_keep_their_order(self, n: int) -> None:
        batch = RNG.integers(0, 256, (n, 8, 8), np.uint8)
        expected = [torch.from_numpy(b.astype(np.float32) / 127.5 - 1)[None] for b in batch]
        forms = [batch, batch[..., None], list(batch), torch.from_numpy(batch)[:, None], [*batch]]
        for form in forms:
            got = as_images(form, 8, 1)
            assert len(got) == n
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    @pytest.mark.parametrize("width", [1, 3, 4])
    def test_last_dimension_of_an_image_goes_before_a_batch(self, width: int) -> None:
        assert len(as_images(np.zeros((5, 6, width), np.uint8), 8, 1)) == 1

    def test_slight_overshoot_of_a_resize(self) -> None:
        (tensor,) = as_images(np.array([[-1e-4, 1.0001]]), 1, 1)
        assert tensor.item() == -1.0

    @pytest.mark.parametrize(
        "images, message",
        [
            ([], "at least one image"),
            (np.zeros((0, 8, 8), np.uint8), "at least one image"),
            (torch.zeros(0, 1, 8, 8), "at least one image"),
            (np.zeros((0, 8), np.uint8), "at least 1 pixel"),
            (torch.zeros(1, 0, 8), "at least 1 pixel"),
            (np.full((8, 8), np.nan), "finite pixels, got NaN"),
            (torch.full((1, 8, 8), float("inf")), "finite pixels, got NaN or infinity"),
            (np.full((8, 8), -1.0), r"in \[0, 1\], got -1 to -1.*latents="),
            (torch.full((1, 8, 8), 16.0), r"in \[0, 1\], got 16 to 16.*latents="),
            (np.zeros(8, np.uint8), r"shape \(8,\)"),
            (np.zeros((2, 8, 8, 2), np.uint8), r"shape \(8, 8, 2\)"),
            (np.zeros((1, 2, 8, 8, 3), np.uint8), r"shape \(1, 2, 8, 8, 3\)"),
            (torch.zeros(8, 8, 3), r"\[c, h, w\].*got shape \(8, 8, 3\)"),
            (torch.zeros(2, 2, 8, 8), r"got shape \(2, 8, 8\)"),
            (np.zeros((8, 8), np.int64), "got int64"),
            (np.zeros((8, 8), bool), "got bool"),
            (np.zeros((8, 8), complex), "got complex128"),
            (np.array([[None, "a"]]), "got object"),
            (torch.zeros(1, 8, 8, dtype=torch.int32), "got int32"),
            (torch.zeros(1, 8, 8, device="meta"), "dense tensor.*on meta"),
            (torch.zeros(1, 8, 8).to_sparse(), "dense tensor.*sparse"),
            (None, "got NoneType"),
            (7, "got int"),
            ([[1, 2]], "got list"),
            ("nowhere.png", "no such file"),
            ([np.zeros((2, 8, 8), np.uint8)], r"one image \[h, w\].*shape \(2, 8, 8\)"),
        ],
    )
    def test_bad_input(self, images: object, message: str) -> None:
        with pytest.raises(ImageError, match=message):
            as_images(images, 8, 1)

    def test_channel_first_array_is_not_taken_for_three_images(self) -> None:
        with pytest.raises(ImageError, match="one channel-first image or three"):
            as_images(np.zeros((3, 8, 8), np.uint8), 8, 3)

    def test_bad_image_is_named_by_its_number(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="image 1: .*no such file"):
            as_images([GREY, tmp_path / "missing.png"], 8, 1)

    def test_truncated_pil_image(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", RNG.integers(0, 256, (64, 64, 3), np.uint8))
        path.write_bytes(path.read_bytes()[:4000])
        with Image.open(path) as image, pytest.raises(ImageError, match="truncated or damaged"):
            as_images(image, 8, 3)


def test_a_damaged_tiff_prints_nothing_of_its_own(tmp_path: Path, capfd) -> None:
    """libtiff writes to the process's stderr, past Python's."""
    path = tmp_path / "damaged.tif"
    Image.fromarray(np.zeros((9, 12, 3), dtype=np.uint8)).save(path, compression="tiff_deflate")
    content = bytearray(path.read_bytes())
    start = Image.open(path).tag_v2[273][0]
    content[start : start + 2] = b"\xff\xff"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="damaged.tif: truncated or damaged"):
        read_image(path)
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"
