"""Corrupted pictures: what they are, that they are always the same, and data sets of them."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import imagecorruptions
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from dive_fast.data import DataSet, Example, corrupted, corruptions, select
from dive_fast.data.corruptions import GROUPS, NAMES, Corruption, read_corruptions
from dive_fast.data.examples import Examples
from dive_fast.data.streams import StreamedExamples
from dive_fast.errors import DataError, DiveFastError, ImageError

ROOT = Path(__file__).parent.parent


def picture(mode: str = "L", size: tuple[int, int] = (28, 28)) -> Image.Image:
    """A bright bar and a ramp on a dark ground; coloured where there are colours."""
    width, height = size
    pixels = np.full((height, width, 3), (30, 50, 70), np.uint8)
    pixels[height // 4 : height // 2, width // 4 : -(width // 4)] = (230, 160, 120)
    pixels[-(height // 4) :] = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    return Image.fromarray(pixels).convert(mode)


def flat(value: int, side: int = 100) -> Image.Image:
    return Image.new("L", (side, side), value)


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


# -- what they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["noise", "blur", "weather", "digital"])
def test_the_groups_are_the_librarys(group: str) -> None:
    assert list(GROUPS[group]) == imagecorruptions.get_corruption_names(group)
    assert list(corruptions.ALL) == imagecorruptions.get_corruption_names("common")
    assert list(GROUPS["extra"]) == imagecorruptions.get_corruption_names("validation")


@pytest.mark.parametrize(
    ("mode", "size"), [("L", (8, 8)), ("L", (28, 28)), ("RGB", (33, 47)), ("RGB", (240, 230))]
)
def test_all_give_a_picture_of_the_same_kind(mode: str, size: tuple[int, int]) -> None:
    clean = picture(mode, size)
    for name in NAMES:
        if (name, mode) == ("saturate", "L"):
            continue
        for severity in (1, 5):
            found = Corruption(name, severity)(clean, "a")
            assert (found.mode, found.size) == (mode, size)
            assert np.abs(values(found) - values(clean)).mean() > 0.05, (name, severity)


def test_they_grow_with_the_severity() -> None:
    clean = picture(size=(28, 28))
    for name in ("gaussian_noise", "shot_noise", "defocus_blur", "fog", "contrast", "pixelate"):
        weak, strong = (
            np.abs(values(Corruption(name, s)(clean, "a")) - values(clean)).mean() for s in (1, 5)
        )
        assert strong > 1.3 * weak, name


def test_noise_in_grey_is_of_the_published_size() -> None:
    """0.18 at severity 3, in each pixel of the picture itself; salt and pepper in 9%."""
    noise = values(Corruption("gaussian_noise", 3)(flat(128), "a")) - 128
    inside = np.abs(noise) < 120  # what was cut off at black and white is left out
    assert noise[inside].std() / 255 == pytest.approx(0.18, rel=0.06)
    ends = values(Corruption("impulse_noise", 3)(flat(128), "a"))
    assert np.isin(ends, (0, 255)).mean() == pytest.approx(0.09, rel=0.15)


def test_what_draws_nothing_is_plain_arithmetic() -> None:
    clean = picture(size=(28, 28))
    x = values(clean)
    brighter = np.clip(x + 0.3 * 255, 0, 255)
    assert np.abs(values(Corruption("brightness", 3)(clean, "a")) - brighter).max() <= 1
    paler = (x - x.mean()) * 0.2 + x.mean()
    assert np.abs(values(Corruption("contrast", 3)(clean, "a")) - paler).max() <= 1
    file = io.BytesIO()
    clean.convert("RGB").save(file, "JPEG", quality=7)
    expected = values(Image.open(file).convert("L"))
    assert np.array_equal(values(Corruption("jpeg_compression", 5)(clean, "a")), expected)
    small = clean.resize((14, 14), Image.Resampling.BOX)
    large = small.resize((28, 28), Image.Resampling.NEAREST)
    assert Corruption("pixelate", 2)(clean, "a") == large


def test_lengths_are_those_of_a_picture_of_224_pixels() -> None:
    """A Gaussian of 6 pixels there is one of 0.75 here, and one of 6 where the side is larger."""
    small, large = picture(size=(28, 28)), picture(size=(240, 240))
    for clean, sigma in ((small, 0.75), (large, 6)):
        found = values(Corruption("gaussian_blur", 5)(clean, "a"))
        expected = gaussian_filter(values(clean), sigma, mode="nearest")
        assert np.abs(found - expected)[3:-3, 3:-3].max() < 12
        assert np.abs(found - expected).mean() < 2


def test_no_corruption_of_tiny_or_thin_pictures() -> None:
    with pytest.raises(ImageError, match="at least 8 x 8.*got one of 7 x 20"):
        Corruption("fog", 1)(picture(size=(20, 7)).transpose(Image.Transpose.ROTATE_90), "a")
    with pytest.raises(ImageError, match="too long and thin"):
        Corruption("fog", 1)(Image.new("L", (8, 400_000)), "a")
    with pytest.raises(DiveFastError, match="saturate changes nothing in grey pictures"):
        Corruption("saturate", 1)(picture(), "a")


# -- always the same -------------------------------------------------------------------------------


def digests(names: list[str]) -> dict[str, str]:
    """Of a picture under each corruption, one after the other."""
    found = {}
    for name in names:
        pixels = Corruption(name, 4, seed=3)(picture("RGB", (28, 28)), "id").tobytes()
        found[name] = hashlib.sha256(pixels).hexdigest()
    return found


def test_the_same_in_every_order_and_process() -> None:
    code = "import test_corruptions as t; print(t.digests(list(reversed(t.NAMES))))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    np.random.seed(99)
    assert eval(done.stdout) == digests(list(NAMES))


def test_the_callers_generator_is_left_alone() -> None:
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    Corruption("snow", 2)(picture(), "a")
    assert np.array_equal(np.random.random(3), expected)


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "fog"])
def test_ids_severities_and_seeds_draw_anew(name: str) -> None:
    clean = picture()
    found = Corruption(name, 2)(clean, "a")
    assert found == Corruption(name, 2)(clean, "a")
    assert found != Corruption(name, 2)(clean, "b")
    assert found != Corruption(name, 2, seed=1)(clean, "a")
    assert found != Corruption(name, 3)(clean, "a")
    # Names of files may be any bytes.
    assert found != Corruption(name, 2)(clean, "a\udcff")


# -- data sets -------------------------------------------------------------------------------------

SHAPE = (1, 12, 12)


class Several:
    """Pictures of different sizes by their row."""

    def loader(self, row: int, example_id: str) -> Callable[[], Image.Image]:
        return lambda: picture("RGB", (20 + row, 30))

    def facts(self, row: int, example_id: str) -> dict[str, int]:
        return {"row": row}


class Stream:
    where = "there"

    def examples(self, start: int) -> Iterator[tuple[int, Callable[[], Example]]]:
        for row in range(start, 4):
            yield row, lambda row=row: Example(f"{row:08d}", 0, Several().loader(row, ""))


def sets() -> dict[str, DataSet]:
    ids = [f"{row:08d}" for row in range(4)]
    lazy = Examples(ids, np.arange(4), Several())
    plain = [Example(name, row, Several().loader(row, name)) for row, name in enumerate(ids)]
    streamed = StreamedExamples(Stream(), range(4))
    found = {"lazy": lazy, "plain": plain, "streamed": streamed}
    return {kind: DataSet("set", examples, None, "content") for kind, examples in found.items()}


@pytest.mark.parametrize("kind", ["lazy", "plain", "streamed"])
def test_a_data_set_is_corrupted_as_a_model_sees_it(kind: str) -> None:
    clean = sets()[kind]
    data = corrupted(clean, "gaussian_noise", 3, image_shape=SHAPE, seed=2)
    assert list(data.ids) == list(clean.ids)
    for row, example in enumerate(data.examples):
        # By hand: the crop of the short side, which is 20 to 23 wide and 30 high, to 12 pixels.
        width = 20 + row
        whole = picture("RGB", (width, 30)).convert("L")
        whole = whole.resize((12, round(30 * 12 / width)), Image.Resampling.BICUBIC)
        top = (whole.height - 12) // 2
        seen = whole.crop((0, top, 12, top + 12))
        assert example.load() == Corruption("gaussian_noise", 3, 2)(seen, example.id)
    some = select(data, 2, 0)
    expected = {example.id: example.load() for example in data.examples}
    assert len(some.examples) == 2
    assert all(example.load() == expected[example.id] for example in some.examples)
    assert all(replace(e).load() == expected[e.id] for e in data.take([1, 3]).examples)


def test_in_their_own_size() -> None:
    clean = sets()["lazy"]
    for example in corrupted(clean, "contrast", 1).examples:
        assert example.load().size == (20 + example.facts["row"], 30)
        assert example.load().mode == "RGB"
    grey = DataSet("set", [Example("0", 0, lambda: np.zeros((9, 11), np.uint16))], None)
    (example,) = corrupted(grey, "contrast", 1).examples
    assert (example.load().mode, example.load().size) == ("L", (11, 9))


def test_the_identity_tells_the_corruption() -> None:
    clean = sets()["lazy"]
    data = corrupted(clean, "fog", 2, image_shape=SHAPE, seed=4)
    told = data.identity()
    corruption = told.pop("corruption")
    assert told == clean.identity()
    assert corruption == {
        "name": "fog",
        "severity": 2,
        "seed": 4,
        "package": "imagecorruptions-imaug 1.1.5",
        "image_shape": [1, 12, 12],
    }
    again = corruptions.corrupted_again(clean, corruption)
    assert again.identity() == data.identity()
    assert again.examples[3].load() == data.examples[3].load()


def test_it_pickles() -> None:
    arrays = np.stack([values(picture(size=(12, 12))).astype(np.uint8)] * 2)
    from dive_fast.data.arrays import ArrayPictures

    clean = DataSet("set", Examples(["a", "b"], np.zeros(2), ArrayPictures(arrays)), None)
    data = corrupted(clean, "shot_noise", 2, image_shape=SHAPE)
    loaded = pickle.loads(pickle.dumps(data))
    first, second = (loaded.examples[i].load() for i in (0, 1))
    assert first == data.examples[0].load() and first != second


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mist", 1), "expected a corruption of gaussian_noise, .* got 'mist'"),
        ((3, 1), "got 3"),
        (("fog", 0), "expected a severity of 1 to 5, got 0"),
        (("fog", True), "got True"),
        (("fog", 2.0), "got 2.0"),
        (("fog", 1, (1, 28)), r"expected an image_shape .* got \(1, 28\)"),
        (("fog", 1, (2, 28, 28)), "1 or 3 channels"),
        (("fog", 1, (1, 28, 32)), "expected an image_shape"),
        (("fog", 1, (1, 4, 4)), "a side of at least 8"),
        (("fog", 1, 28), "got 28"),
        (("fog", 1, None, -1), "seed must be"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    names = ("name", "severity", "image_shape", "seed")
    given = dict(zip(names, arguments, strict=False))
    with pytest.raises(DiveFastError, match=message):
        corrupted(sets()["lazy"], **given)


def test_not_twice() -> None:
    once = corrupted(sets()["plain"], "fog", 1)
    with pytest.raises(DataError, match="expected clean images"):
        corrupted(once, "fog", 1)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["fog:2"], ["fog-2"]),
        (["snow", "snow:1"], [f"snow-{s}" for s in range(1, 6)]),
        (
            ["noise:1-2"],
            [f"{n}_noise-{s}" for n in ("gaussian", "shot", "impulse") for s in (1, 2)],
        ),
        (["all:5"], [f"{name}-5" for name in NAMES[:15]]),
        (["extra:3"], [f"{name}-3" for name in NAMES[15:]]),
    ],
)
def test_texts(texts: list[str], expected: list[str]) -> None:
    assert list(map(str, read_corruptions(texts))) == expected


@pytest.mark.parametrize("text", ["mist", "fog:", "fog:6", "fog:3-1", "fog:1,2", ":2", "fog:1-"])
def test_bad_texts(text: str) -> None:
    with pytest.raises(DiveFastError, match="expected a (corruption|severity) of"):
        read_corruptions([text])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module"),
            r"not installed: pip install 'dive_fast\[corruptions\]'",
        ),
        (
            ImportError("libGL.so.1: cannot open"),
            "libGL.so.1: .*pip install opencv-python-headless",
        ),
    ],
)
def test_without_the_package(error, message: str, monkeypatch) -> None:
    real = builtins.__import__

    def missing(name: str, *more: object, **others: object):
        if name == "imagecorruptions":
            raise error
        return real(name, *more, **others)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DiveFastError, match=message):
        corrupted(sets()["plain"], "fog", 1)
