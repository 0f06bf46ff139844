"""``dive-fast compare``: generators and checkpoints by their names, and what is told of them."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from command import assert_refused, call
from evaluate_inputs import write_pictures
from PIL import Image
from tiny import NAMES, read_json, write_model

from dive_fast.cli.compare import Spec, read_spec
from dive_fast.errors import DiveFastError, ModelError, RunError
from dive_fast.evaluation.checkpoints import find_checkpoints

FEW = ("--probes", 3, "--likelihood-probes", 8, "--resamples", 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training, with three checkpoints that sort otherwise as texts."""
    out = tmp_path_factory.mktemp("training")
    for seed, step in enumerate((1000, 20, 300)):
        write_model(out / "checkpoints" / f"checkpoint-{step}", seed=seed)
    (out / "checkpoints" / "notes").mkdir()
    (out / "checkpoints" / "log-7").write_text("no folder")
    return out


class TestCheckpoints:
    def test_by_their_steps(self, training: Path) -> None:
        for folder in (training, training / "checkpoints"):
            found = find_checkpoints(folder)
            assert [c.step for c in found] == [20, 300, 1000]
            assert found[0].path.name == "checkpoint-20" and not found[0].is_lora

    @pytest.mark.parametrize(
        ("name", "step"), [("500", 500), ("step_0012", 12), ("epoch.3-7", 7), ("ckpt2", 2)]
    )
    def test_names(self, name: str, step: int, tmp_path: Path) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
        assert find_checkpoints(tmp_path)[0].step == step

    def test_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="expected a folder of checkpoints, got none"):
            find_checkpoints(tmp_path / "none")
        with pytest.raises(ModelError, match="such as checkpoint-500, got none"):
            find_checkpoints(tmp_path)
        (tmp_path / "checkpoint-5").mkdir()
        with pytest.raises(ModelError, match="checkpoint-5: expected a model directory"):
            find_checkpoints(tmp_path)
        for name in ("checkpoint-5", "epoch-05"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "model_index.json").write_text("{}")
        with pytest.raises(ModelError, match="one checkpoint of each step, got 'checkpoint-5' and"):
            find_checkpoints(tmp_path)


class TestSpecs:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("digits", Spec("digits", "digits")),
            ("org/model", Spec("org/model", "org/model")),
            ("base=org/model", Spec("base", "org/model")),
            ("a+b.safetensors", Spec("a+b.safetensors", "a", "b.safetensors")),
            ("x=a+b@0.5", Spec("x", "a", "b", 0.5)),
            ("a+b@-1", Spec("a+b@-1", "a", "b", -1.0)),
        ],
    )
    def test_parts(self, given: str, expected: Spec) -> None:
        assert read_spec(given) == expected

    def test_what_is_there_is_a_path(self, tmp_path: Path) -> None:
        odd = tmp_path / "a=b+c@2"
        odd.mkdir()
        assert read_spec(str(odd)) == Spec(str(odd), str(odd))
        assert read_spec(f"n={odd}") == Spec("n", str(odd))
        assert read_spec(f"n={odd}+x") == Spec("n", str(odd), "x")

    @pytest.mark.parametrize("given", ["", "=a", "a=", "a+", "+b", "a+b@", "a+b@x", "a+b@nan"])
    def test_refused(self, given: str) -> None:
        with pytest.raises(DiveFastError, match="got '"):
            read_spec(given)


class TestCommand:
    def test_checkpoints(self, training: Path, folder: Path, tmp_path: Path, capsys) -> None:
        out = tmp_path / "out"
        arguments = ("compare", "--checkpoints", training, "--data", folder, "--out", out, *FEW)
        said = call(capsys, *arguments)
        assert (said.code, said.err) == (0, "")
        rows = [line.split("  ")[0] for line in said.out.splitlines()]
        assert rows[1:4] == ["step 20", "step 300", "step 1000"]
        assert rows[5:8] == ["less step 1000", "step 20", "step 300"]
        found = read_json(out / "comparison.json")
        assert [row["step"] for row in found["rows"]] == [20, 300, 1000]
        assert found["reference"] == "step 1000" and found["n"] == 12
        assert ET.parse(out / "comparison.svg").getroot().tag.endswith("svg")
        with Image.open(out / "comparison.png") as drawn:
            assert drawn.format == "PNG" and np.asarray(drawn).std() > 1
        assert {"step_20", "step_300", "step_1000"} <= {p.name for p in out.iterdir()}
        again = call(capsys, *arguments, "--json")
        assert json.loads(again.out) == found

    def test_models(self, training: Path, folder: Path, tmp_path: Path, capsys) -> None:
        models = (f"{n}={training}/checkpoints/checkpoint-{n}" for n in (20, 300))
        out = tmp_path / "out"
        said = call(
            capsys, "compare", *models, "--data", folder, "--out", out, "--limit", 5,
            "--classes-per-image", 2, "--reference", "300", *FEW,
        )  # fmt: skip
        assert (said.code, said.err) == (0, "")
        assert "5 images, 3 probes" in said.out and "note: each image was tried" in said.out
        assert not (out / "comparison.svg").exists()
        assert call(capsys, "compare-runs", out / "20", out / "300").code == 0

    def test_an_image_that_cannot_be_read(self, training, folder, tmp_path, capsys) -> None:
        own = shutil.copytree(folder, tmp_path / "pictures")
        (own / "star" / "02.png").write_bytes(b"")
        said = call(
            capsys, "compare", "--checkpoints", training, "--data", own, "--out", tmp_path / "o",
            *FEW,
        )  # fmt: skip
        assert said.code == 2 and "11 images (1 more could not be read)" in said.out

    def test_a_lora(self, sd: Path, folder: Path, tmp_path: Path, capsys) -> None:
        pytest.importorskip("peft", reason="LoRA needs peft")
        from diffusers import StableDiffusionPipeline
        from tiny_lora import write_lora

        pipeline = StableDiffusionPipeline.from_pretrained(sd)
        lora = write_lora(pipeline, tmp_path / "lora" / "checkpoint-9", "unet")
        out = tmp_path / "out"
        said = call(
            capsys, "compare", f"base={sd}", f"none=" f"{sd}+{lora}@0", f"tuned={sd}+{lora}",
            "--data", folder, "--out", out, "--limit", 3, *FEW,
        )  # fmt: skip
        assert (said.code, said.err) == (0, "")
        rows = read_json(out / "comparison.json")["rows"]
        assert rows[1]["difference"]["figures"]["margin"]["value"] == 0
        assert rows[2]["difference"]["figures"]["log_likelihood"]["value"] != 0
        said = call(
            capsys, "compare", sd, "--checkpoints", tmp_path / "lora", "--data", folder,
            "--out", tmp_path / "steps", "--limit", 3, *FEW,
        )  # fmt: skip
        assert (said.code, said.err) == (0, "")
        rows = read_json(tmp_path / "steps" / "comparison.json")["rows"]
        assert [row["step"] for row in rows] == [None, 9]


class TestRefused:
    def expect(self, match: str, capsys, *arguments: object) -> None:
        assert_refused(call(capsys, "compare", *arguments, *FEW), match)

    def test_generators(self, training: Path, folder: Path, tmp_path: Path, capsys) -> None:
        one = training / "checkpoints" / "checkpoint-20"
        rest = ("--data", folder, "--out", tmp_path / "out")
        self.expect("at least two generators to compare, got 0", capsys, *rest)
        self.expect("at least two generators to compare, got 1", capsys, one, *rest)
        self.expect("different names, got .* twice: give it as NAME=", capsys, one, one, *rest)
        self.expect("expected a folder of checkpoints", capsys, "--checkpoints", "none", *rest)
        self.expect("a reference of a, b, got 'c'", capsys, f"a={one}", f"b={one}", *rest,
                    "--reference", "c")  # fmt: skip
        assert not (tmp_path / "out").exists()

    def test_a_lora_without_its_model(self, folder: Path, tmp_path: Path, capsys) -> None:
        lora = tmp_path / "checkpoint-9" / "pytorch_lora_weights.safetensors"
        lora.parent.mkdir()
        lora.write_bytes(b"")
        rest = ("--checkpoints", tmp_path, "--data", folder, "--out", tmp_path / "out")
        self.expect("is a LoRA: expected one GENERATOR", capsys, *rest)

    def test_other_classes(self, training: Path, folder: Path, tmp_path: Path, capsys) -> None:
        other = write_model(tmp_path / "other", names=[*NAMES[:3], "ring"])
        self.expect("expected generators of the same classes, got 'cross'", capsys,
                    training / "checkpoints" / "checkpoint-20", other,
                    "--data", folder, "--out", tmp_path / "out")  # fmt: skip

    def test_no_labels(self, training: Path, tmp_path: Path, capsys) -> None:
        (tmp_path / "flat").mkdir()
        Image.new("L", (8, 8)).save(tmp_path / "flat" / "x.png")
        self.expect("sub-folder", capsys, "--checkpoints", training,
                    "--data", tmp_path / "flat", "--out", tmp_path / "out")  # fmt: skip
