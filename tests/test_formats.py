"""Which image formats are read: no other is tried, and no other program is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command import assert_refused, call
from PIL import EpsImagePlugin, Image, features

from dive_fast.data.formats import FORMATS, IMAGE_SUFFIXES, readable_formats
from dive_fast.data.images import as_image, as_images, read_image, to_mode
from dive_fast.errors import ImageError
from dive_fast.predict.drawing import draw_boxes

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
# What writes a format that Pillow reads under another name.
WRITTEN_AS = {".pfm": "F", ".pbm": "1", ".pgm": "L"}
NEEDS = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The programs that were to be started; none is."""
    found: list[object] = []

    def popen(command: object, *rest: object, **more: object) -> None:
        found.append(command)
        raise OSError("no program is started in this test")

    monkeypatch.setattr(subprocess, "Popen", popen)
    # As in a new process: nobody has looked yet whether Ghostscript is there.
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return found


@pytest.fixture
def postscript(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    return tmp_path / "a.png"


class TestNoProgramIsStarted:
    def test_pillow_itself_starts_one(self, started: list[object], postscript: Path) -> None:
        """What the other tests would see if every format were tried."""
        with Image.open(postscript) as image, pytest.raises(OSError):
            image.load()
        assert started

    def test_file(self, started: list[object], postscript: Path) -> None:
        with pytest.raises(ImageError, match="expected an image, got PostScript, which is not"):
            read_image(postscript)
        assert not started

    @pytest.mark.parametrize(
        "use",
        [
            as_image,
            lambda image: as_images(image, 8, 3),
            lambda image: to_mode(image, 3),
            lambda image: draw_boxes(image, [], [], []),
        ],
    )
    def test_opened_by_the_user(self, started: list[object], postscript: Path, use) -> None:
        with Image.open(postscript) as image:
            assert image.format == "EPS"
            with pytest.raises(ImageError, match="the PIL image of 10 x 10: .* got EPS that is"):
                use(image)
        assert not started

    def test_command(self, started: list[object], postscript: Path, dit_dir, capsys) -> None:
        said = call(capsys, "classify", postscript, "--model", dit_dir)
        assert_refused(said, r"a\.png: expected an image, got PostScript")
        assert not started


def test_pixels_that_are_there_may_come_from_anywhere(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.sgi")
    with Image.open(tmp_path / "a.sgi") as image:
        with pytest.raises(ImageError, match="got SGI that is not decoded"):
            as_image(image)
        image.load()
        assert as_image(image).size == image.size


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_suffix_is_of_a_format_that_is_read(suffix: str, tmp_path: Path) -> None:
    """By Pillow's own table of suffixes: what it writes under that name is read again."""
    (name,) = (name for name, suffixes in FORMATS.items() if suffix in suffixes)
    if name in NEEDS and not features.check(NEEDS[name]):
        pytest.skip(f"this Pillow has no {name}")
    path = tmp_path / f"a{suffix}"
    picture = Image.new(WRITTEN_AS.get(suffix, "RGB"), (8, 8))
    picture.save(path, Image.registered_extensions().get(suffix))
    assert read_image(path).size == (8, 8)


def test_suffixes_are_pillows() -> None:
    """None of a format that is read is missing, none is another format's."""
    theirs = {s: f for s, f in Image.registered_extensions().items() if f in readable_formats()}
    ours = {suffix: name for name, suffixes in FORMATS.items() for suffix in suffixes}
    # Truevision's rarer names and animated AVIF: names that other files have, too.
    assert set(theirs) - set(ours) <= {".avifs", ".icb", ".vda", ".vst", ".dib"}
    # DIB is the older name of BMP's content.
    assert all(ours[s] == f for s, f in theirs.items() if s in ours)


HEADS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG XL": b"\xff\x0a\xfa\x1f",
    "PDF": b"%PDF-1.7\n",
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "Photoshop": b"8BPS\0\x01" + bytes(30),
    "a web page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "a numpy array": b"\x93NUMPY\x01\0",
    "a video": b"\0\0\0\x18ftypisom\0\0\0\0",
    "DICOM": bytes(128) + b"DICM" + bytes(20),
    "a file of no known image format": b"no image at all",
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_file_of_another_kind_is_called_so(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(HEADS[kind])
    with pytest.raises(ImageError, match=f"expected an image, got {kind}[,.]") as refused:
        read_image(tmp_path / "a.jpg")
    pictures = kind in ("HEIC", "JPEG XL", "PDF", "SVG", "Photoshop", "DICOM")
    assert str(refused.value).endswith("convert it to JPEG or PNG.") == pictures


def test_the_content_says_the_format(tmp_path: Path) -> None:
    Image.new("L", (3, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").size == (3, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = bytes(tmp_path) + b"/\xff.png"
    Image.new("L", (3, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(Path(path.decode(errors="surrogateescape")))
    assert read_image(path).size == (3, 2)
