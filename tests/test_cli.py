"""The command line: classify, info, and what goes wrong before a model is asked."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call, words
from PIL import Image
from tiny import NAMES

import dive_fast
from dive_fast import DiffusionClassifier, ImageError
from dive_fast.data import digits

ROOT = Path(__file__).parent.parent


def picture(seed: int = 0, size: tuple[int, int] = (8, 8)) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture().save(tmp_path / "image.png")
    return tmp_path / "image.png"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def bomb() -> bytes:
    """A PNG that claims 60,000 x 60,000 pixels."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + head + data + png_chunk(b"IEND", b"")


def png() -> bytes:
    buffer = io.BytesIO()
    picture(size=(30, 30)).save(buffer, "png")
    return buffer.getvalue()


BAD_FILES = {
    "empty": (b"", r"got an empty one \(0 bytes\)"),
    "cut": (png()[:400], "truncated or damaged"),
    "cut header": (png()[:20], "image.png: "),
    "text": (b"no image at all", "no known image format"),
    "bomb": (bomb(), "expected at most 89,478,485 pixels"),
}


class TestClassify:
    def test_a_digit(self, tmp_path: Path, capsys) -> None:
        """The built-in model on real digits, with the settings that a newcomer gets."""
        images, labels = digits.load_digits("test")
        for i in range(3):
            Image.fromarray(images[i]).save(tmp_path / f"{i}.png")
        said = call(capsys, "classify", tmp_path)
        assert (said.code, said.err) == (0, "")
        for i, line in enumerate(said.out.splitlines()):
            name, label, probability = line.rsplit(maxsplit=2)
            assert name == f"{tmp_path / f'{i}.png'}:"
            assert label == digits.NAMES[labels[i]]
            assert 0.2 < float(probability) <= 1

    @pytest.mark.parametrize("strategy", ["enumerate", "invert"])
    @pytest.mark.parametrize("kind", ["dit_dir", "latent_dit_dir"])
    def test_json(self, strategy: str, kind: str, image: Path, capsys, request) -> None:
        model = request.getfixturevalue(kind)
        said = call(
            capsys, "classify", image, "--model", model, "--strategy", strategy, "--json",
            "--top", 3, "--probes", 6,
        )  # fmt: skip
        assert (said.code, said.err) == (0, "")
        (record,) = json.loads(said.out)
        clf = DiffusionClassifier.from_pretrained(model)
        (expected,) = clf(image, strategy=strategy, probes=6)
        assert record["id"] == str(image)
        assert record["label"] == expected.label == NAMES[record["index"]]
        assert record["probability"] == pytest.approx(expected.probability, rel=1e-4)
        assert record["top"] == [
            {**t, "score": pytest.approx(t["score"], rel=1e-4)} for t in expected.top(3)
        ]
        assert record["evaluations"] == expected.evaluations > 0
        assert record["seconds"] > 0
        for key in ("log_posterior", "losses", "n_probes"):
            assert len(record[key]) == len(NAMES)
        measured = [n > 0 for n in record["n_probes"]]
        assert [x is not None for x in record["losses"]] == measured
        assert any(measured) and (strategy != "enumerate" or all(measured))

    @pytest.mark.parametrize("k", [1, 2, 4, 99])
    def test_top(self, k: int, dit_dir: Path, image: Path, capsys) -> None:
        said = call(
            capsys, "classify", image, "--model", dit_dir, "--strategy", "enumerate",
            "--probes", 5, "--top", k,
        )  # fmt: skip
        (line,) = said.out.splitlines()
        entries = [entry.split() for entry in line.removeprefix(f"{image}: ").split(", ")]
        scores = [float(score) for _, score in entries]
        assert len(entries) == min(k, len(NAMES))
        assert scores == sorted(scores, reverse=True)
        assert {name for name, _ in entries} <= set(NAMES)

    def test_files_folders_and_globs(self, dit_dir: Path, tmp_path: Path, capsys) -> None:
        names = ["b.png", "a.jpg", "c.bmp"]
        folder = tmp_path / "folder"
        folder.mkdir()
        for i, name in enumerate(names):
            picture(i, size=(9 + i, 20)).save(folder / name)
        (folder / "notes.txt").write_text("no image, and not asked for")
        told = f"dive-fast: {folder}: left out 1 without an image's suffix (.txt).\n"

        def listed(*inputs: object) -> list[str]:
            said = call(capsys, "classify", *inputs, "--model", dit_dir, "--probes", 2)
            assert (said.code, said.err) == (0, told if folder in inputs else "")
            return [line.partition(": ")[0] for line in said.out.splitlines()]

        a, b, c = (str(folder / name) for name in ("a.jpg", "b.png", "c.bmp"))
        assert listed(folder) == [a, b, c]
        assert listed(folder / "*.[jp]*") == [a, b]
        assert listed(c, folder / "a*", c) == [c, a, c]

    @pytest.mark.parametrize("size", [1, 7, 1000])
    def test_batch_size(self, size: int, dit_dir: Path, tmp_path: Path, capsys) -> None:
        """The answers do not depend on how the rows are packed."""
        for i in range(5):
            picture(i).save(tmp_path / f"{i}.png")
        arguments = ("classify", tmp_path, "--model", dit_dir, "--probes", 5, "--json")
        expected = json.loads(call(capsys, *arguments).out)
        found = json.loads(call(capsys, *arguments, "--batch-size", size).out)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["evaluations"] == theirs["evaluations"]
            assert mine["n_probes"] == theirs["n_probes"]
            for a, b in zip(mine["losses"], theirs["losses"], strict=True):
                assert a == (b if b is None else pytest.approx(b, rel=1e-4))

    def test_seed(self, dit_dir: Path, image: Path, capsys) -> None:
        def losses(seed: int) -> list[float]:
            said = call(
                capsys, "classify", image, "--model", dit_dir, "--strategy", "enumerate",
                "--probes", 5, "--json", "--seed", seed,
            )  # fmt: skip
            return json.loads(said.out)[0]["losses"]

        assert losses(1) == losses(1) != losses(2)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
    def test_modes(self, mode: str, latent_dit_dir: Path, tmp_path: Path, capsys) -> None:
        path = tmp_path / "image.tif"
        if mode == "I;16":
            Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
        else:
            picture().convert(mode).save(path)
        with Image.open(path) as saved:
            assert saved.mode == mode
        said = call(capsys, "classify", path, "--model", latent_dit_dir, "--probes", 2)
        assert (said.code, said.err) == (0, "")
        assert said.out.startswith(f"{path}: ")

    @pytest.mark.parametrize("bad", BAD_FILES)
    def test_bad_file(self, bad: str, dit_dir: Path, image: Path, capsys) -> None:
        content, message = BAD_FILES[bad]
        image.write_bytes(content)
        said = call(capsys, "classify", image, "--model", dit_dir)
        assert_refused(said, message)
        assert said.out == ""

    def test_bad_files_among_good_ones(self, dit_dir: Path, tmp_path: Path, capsys) -> None:
        """Each bad one is told, in its place, and the rest go on."""
        for i in (1, 3):
            picture(i).save(tmp_path / f"{i}.png")
        (tmp_path / "0.png").write_bytes(b"")
        (tmp_path / "2.png").write_bytes(png()[:400])
        said = call(capsys, "classify", tmp_path, tmp_path / "4.png", "--model", dit_dir, "--json")
        assert said.code == 2
        assert [line.partition(": ")[0] for line in said.err.splitlines()] == ["dive-fast"] * 3
        records = json.loads(said.out)
        assert [Path(record["id"]).name for record in records] == [f"{i}.png" for i in range(5)]
        assert ["error" in record for record in records] == [True, False, True, False, True]
        assert records[4]["error"].endswith("4.png: no such file or folder.")

        said = call(capsys, "classify", tmp_path, "--model", dit_dir)
        assert said.code == 2
        assert [line.partition(":")[0][-5:] for line in said.out.splitlines()] == ["1.png", "3.png"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing.png", "missing.png: no such file or folder"),
            ("*.gif", "expected files of this pattern, got none"),
            ("folder", "expected images in this folder, got none"),
            ("", ": no such file or folder"),
        ],
    )
    def test_no_input(self, name: str, message: str, tmp_path: Path, capsys) -> None:
        (tmp_path / "folder").mkdir()
        argument = tmp_path / name if name else ""
        assert_refused(call(capsys, "classify", argument), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "guess"], "expected a strategy of auto, enumerate, invert.*, got 'guess'"),
        (["--preset", "x"], "expected a preset of dive-paper, diffusion-classifier.*, got 'x'"),
        (["--strategy", "enumerate", "--preset", "dive-paper"], "belongs to strategy 'invert'"),
        (["--preset", "dive-paper", "--probes", "4"], "multiple of the batch of 25, got 4"),
        (["--preset", "diffusion-classifier", "--probes", "4"], "take 500 probes, got 4"),
        (["--probes", "0"], "--probes: expected a whole number of at least 1, got '0'"),
        (["--probes", "many"], "--probes: expected a whole number of at least 1, got 'many'"),
        (["--top", "-1"], "--top: expected a whole number of at least 1, got '-1'"),
        (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 .* got '-1'"),
        (["--seed", str(2**63)], "--seed: expected a whole number from 0"),
        (["--seed", "one"], "--seed: expected a whole number from 0 .* got 'one'"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=words,
)
def test_bad_option(options: list[str], message: str, dit_dir: Path, image: Path, capsys) -> None:
    assert_refused(call(capsys, "classify", image, "--model", dit_dir, *options), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["guess"], "invalid choice: 'guess'"),
        (["classify"], "required: IMAGE"),
        (["evaluate", "--data", "digits"], "required: --out"),
        (["train", "letters", "--out", "x"], "invalid choice: 'letters'"),
        (["demo", "--limit", "0"], "--limit: expected a whole number of at least 1"),
    ],
    ids=words,
)
def test_bad_command(arguments: list[str], message: str, capsys) -> None:
    assert_refused(call(capsys, *arguments), message)


def test_bad_arrays(dit_dir: Path) -> None:
    """The same in Python: NaN, ranges, shapes and types."""
    clf = DiffusionClassifier.from_pretrained(dit_dir)
    good = np.full((8, 8), 0.5)
    for bad, message in (
        (np.full((8, 8), np.nan), "finite pixels"),
        (torch.full((8, 8), torch.inf), "finite pixels"),
        (good * 4, r"in \[0, 1\]"),
        (np.zeros((8, 8), dtype=np.int64), "uint8, uint16 or floating point"),
        (np.zeros(8), r"got shape \(8,\)"),
        (np.zeros((0, 8)), "at least 1 pixel"),
        ([], "at least one image"),
        ([good, np.full((8, 8), np.nan)], "image 1: expected finite pixels"),
        ([good, 3], "image 1: .*got int"),
    ):
        with pytest.raises(ImageError, match=message):
            clf(bad)


def test_info(capsys) -> None:
    said = call(capsys, "info", "--json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert found["versions"]["dive_fast"] == dive_fast.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["ops"]) >= {"q_sample", "noise_prediction_loss"}
    for status in found["ops"].values():
        assert isinstance(status["native"], bool)
        assert status["reason"]
    assert "digits" in found["models"]
    assert {"enumerate", "invert"} <= set(found["strategies"])
    assert {"dive-paper", "diffusion-classifier"} <= set(found["presets"])

    said = call(capsys, "info")
    assert (said.code, said.err) == (0, "")
    for word in (*found["ops"], *found["presets"], torch.__version__):
        assert word in said.out


@pytest.mark.parametrize(
    "command", ["", "classify", "detect", "evaluate", "fit", "train", "demo", "info"]
)
def test_help(command: str, capsys) -> None:
    said = call(capsys, *command.split(), "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"usage: dive-fast {command}".strip())
    assert not command or len(said.out.splitlines()) > 5


def command_line(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "dive_fast", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)  # buffered, as users have it
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **options
    )


def test_reader_that_leaves(dit_dir: Path, image: Path) -> None:
    """``dive-fast classify ... | true`` ends without a word; so little is written at the end."""
    process = command_line(
        "classify", image, "--model", dit_dir, "--probes", 1, stdout=subprocess.PIPE
    )
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(), errors) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_output_that_cannot_be_written(dit_dir: Path, image: Path) -> None:
    with open("/dev/full", "w") as full:
        process = command_line("classify", image, "--model", dit_dir, "--probes", 1, stdout=full)
        errors = process.stderr.read()
    assert process.wait() == 2
    assert errors == "dive-fast: the output cannot be written: No space left on device.\n"


def test_evaluate_offers_a_fit_of_a_model_that_was_never_fitted(
    dit_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("dive_fast.cli.evaluate.WORTH_A_FIT", 2)
    arrays = np.zeros((2, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", images=arrays, labels=np.array([0, 1]))
    run = ["evaluate", "--data", tmp_path / "two.npz", "--probes", 4]
    said = call(capsys, *run, "--model", dit_dir, "--out", tmp_path / "a")
    assert said.code == 0
    assert f"'dive-fast fit --model {dit_dir} --unlabelled IMAGES'" in said.err
    said = call(capsys, *run, "--model", dit_dir, "--out", tmp_path / "b", "--strategy", "race")
    assert "never fitted" not in said.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--unlabelled", "nowhere"], "nowhere: no such file or folder."),
        (["--unlabelled", ".", "--generate", 3], "expected --generate or --unlabelled, got both."),
        (["--unlabelled", ".", "--what", "beta"], "fitting beta needs --data."),
        ([], "needs --data, --unlabelled or --generate."),
        (["--data", "scenes", "--unlabelled", "."], "--unlabelled is for classifiers; scenes is"),
    ],
)
def test_fit_says_what_it_needs(options, sentence, dit_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(capsys, "fit", "--model", dit_dir, "--out", tmp_path / "fitted", *options)
    assert_refused(said, sentence)


def test_fit_of_images_without_labels(dit_dir, image, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "fitted"
    folder.mkdir()
    for i in range(3):
        Image.open(image).rotate(90 * i).save(folder / f"{i}.png")
    said = call(capsys, "fit", "--model", dit_dir, "--unlabelled", folder, "--out", out)
    assert said.code == 0, said.err
    assert "tried on 3 images, each left out in its turn:" in said.out
    assert "timesteps" in json.loads((out / "dive_fast.json").read_text())
