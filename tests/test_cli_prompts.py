"""Stable Diffusion on the command line: --classes, --template, --average."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import assert_refused, call
from pictures import noise_picture
from tiny import read_json

from dive_fast import DiffusionClassifier


@pytest.fixture
def image(tmp_path: Path) -> Path:
    noise_picture((20, 16), 80).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def classify(capsys, image, model, *options: object) -> dict:
    said = call(
        capsys, "classify", image, "--model", model, "--strategy", "enumerate", "--probes", 4,
        "--json", *options,
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    (record,) = json.loads(said.out)
    return record


@pytest.mark.parametrize("average", ["embedding", "loss"])
def test_classes_and_templates(average, sd, image, capsys):
    found = classify(
        capsys, image, sd, "--classes", "cat, dog,fox", "--average", average,
        "--template", "a {}", "--template", "{}!",
    )  # fmt: skip
    clf = DiffusionClassifier.from_pretrained(
        sd, classes=["cat", "dog", "fox"], templates=["a {}", "{}!"], average=average
    )
    (expected,) = clf(image, strategy="enumerate", probes=4)
    assert found["label"] == expected.label
    assert found["losses"] == pytest.approx(expected.losses.tolist(), rel=1e-4)


def test_a_file_of_classes(sd, image, tmp_path, capsys):
    file = tmp_path / "names"
    file.write_text("cat\n\n  fox, red \ndog\n", encoding="utf-8")
    found = classify(capsys, image, sd, "--classes", file, "--top", 3)
    assert {entry["label"] for entry in found["top"]} == {"cat", "fox, red", "dog"}


def test_a_table_of_prompts(sd, image, tmp_path, capsys):
    """As the published Diffusion Classifier has it; two classes of one name stay two."""
    (tmp_path / "prompts.csv").write_text(
        "prompt,classname,classidx\na dog,dog,1\na crane,crane,0\nmy dog,dog,1\na crane,crane,2\n"
    )
    said = call(
        capsys, "classify", image, "--model", sd, "--strategy", "enumerate", "--probes", 4,
        "--json", "--classes", tmp_path / "prompts.csv", "--top", 3,
    )  # fmt: skip
    (record,) = json.loads(said.out)
    assert said.code == 0 and "'crane (0)', 'crane (2)'" in said.err
    assert len(said.err.splitlines()) == 1
    found = {(entry["index"], entry["label"]) for entry in record["top"]}
    assert found == {(0, "crane (0)"), (1, "dog"), (2, "crane (2)")}
    expected = DiffusionClassifier.from_pretrained(sd, classes={"dog": ["a dog", "my dog"]})
    losses = expected(image, strategy="enumerate", probes=4)[0].losses
    assert record["losses"][1] == pytest.approx(losses[0].item(), rel=1e-4)
    said = call(
        capsys, "classify", image, "--model", sd, "--classes", tmp_path / "prompts.csv",
        "--template", "a {}",
    )  # fmt: skip
    assert said.code == 2 and "templates, or classes with their prompts, got both" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs classes: .* or --classes cat,dog on the command line"),
        (["--classes", ""], "classes must hold texts that are not empty, got ''"),
        (["--classes", "cat,,dog"], "classes must hold texts that are not empty, got ''"),
        (["--classes", "names.txt"], "classes with commas .* or a file of them, got 'names.txt'"),
        (["--classes", "a/names"], "classes with commas .* or a file of them, got 'a/names'"),
        (["--classes", "cat,dog", "--template", "x"], "a template needs {} where .* got 'x'"),
        (["--classes", "cat,dog", "--average", "x"], "an average of embedding, loss, got 'x'"),
    ],
)
def test_bad_options(options, message, sd, image, capsys):
    assert_refused(call(capsys, "classify", image, "--model", sd, *options), message)


def test_bad_files_of_classes(sd, image, tmp_path, capsys):
    file = tmp_path / "names"
    for content, message in (
        (b"", "expected at least one class, got an empty file"),
        (b"\xff\xfe\xfd", "cannot be read as a list of classes"),
    ):
        file.write_bytes(content)
        said = call(capsys, "classify", image, "--model", sd, "--classes", file)
        assert_refused(said, message)


@pytest.mark.parametrize("option", ["--classes", "--template", "--average"])
def test_a_model_with_classes_of_its_own(option, image, capsys):
    name = {"--template": "templates"}.get(option, option.removeprefix("--"))
    said = call(capsys, "classify", image, option, "{} cat, dog")
    assert_refused(said, f"digits has classes of its own: {name} is for text-conditional models")


def folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        noise_picture((16, 16), 80).save(root / name / "1.png")
    return root


def test_evaluate_asks_about_the_folders_names(sd, tmp_path, capsys):
    data = folder(tmp_path / "data", ("cat", "dog"))
    arguments = ("evaluate", "--model", sd, "--data", data, "--probes", 4, "--json")
    said = call(capsys, *arguments, "--out", tmp_path / "a")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out)["n"] == 2
    config = read_json(tmp_path / "a" / "run.json")
    assert "a photo of a cat." in json.dumps(config)
    # Other classes are another run.
    said = call(capsys, *arguments, "--out", tmp_path / "a", "--classes", "cat,dog,fox")
    assert said.code == 2
    said = call(capsys, *arguments, "--out", tmp_path / "b", "--classes", "fox,dog,cat")
    assert said.code == 0
    # Folders that were not asked about.
    said = call(capsys, *arguments, "--out", tmp_path / "c", "--classes", "fox,dog")
    assert_refused(said, "does not know the classes 'cat'")


def test_evaluate_without_folders_needs_classes(sd, tmp_path, capsys):
    said = call(capsys, "evaluate", "--model", sd, "--data", "digits", "--out", tmp_path / "run")
    assert_refused(said, "needs classes")
    (tmp_path / "empty").mkdir()
    said = call(
        capsys, "evaluate", "--model", sd, "--data", tmp_path / "empty", "--out", tmp_path / "r"
    )
    assert_refused(said, "needs classes")
