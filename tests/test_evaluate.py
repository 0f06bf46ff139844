"""Evaluation: figures, records, resuming."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call, words
from evaluate_inputs import pixels, write_pictures
from tiny import NAMES, read_json, write_model

from dive_fast import DiffusionClassifier
from dive_fast.data import DataSet, Example, digits
from dive_fast.data.images import read_image
from dive_fast.evaluation import evaluate, read_records, summarise

ROOT = Path(__file__).parent.parent
SUMMARY = {
    "accuracy", "standard_error", "mean_per_class_accuracy", "expected_calibration_error",
    "n", "failed", "evaluations_per_image", "seconds_per_image", "fill_rate", "top5_accuracy",
    "auroc", "macro_f1", "nll", "brier", "standard_errors", "groups",
}  # fmt: skip


@pytest.fixture(scope="module")
def digit_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows the digits by name; its answers are random."""
    return write_model(tmp_path_factory.mktemp("digits"), names=digits.NAMES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "data")


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def assert_same_answers(found: dict[str, dict], expected: dict[str, dict]) -> None:
    assert found.keys() == expected.keys()
    for key, record in expected.items():
        for name in ("label", "index", "truth", "evaluations", "n_probes"):
            assert found[key][name] == record[name]
        for a, b in zip(found[key]["losses"], record["losses"], strict=True):
            assert a == (b if b is None else pytest.approx(b, rel=1e-4))


class TestFigures:
    def test_summarise(self) -> None:
        def record(truth: int, index: int) -> dict:
            return {
                "truth": truth, "index": index, "probability": 0.9,
                "evaluations": 10, "seconds": 0.5,
            }  # fmt: skip

        # Class 0: 3 of 4 right; class 2: 0 of 1.
        records = [record(0, 0), record(0, 0), record(0, 1), record(0, 0), record(2, 0)]
        found = summarise([*records, {"truth": 2, "error": "bad"}])
        assert found.to_dict() == {
            "accuracy": pytest.approx(0.6),
            "standard_error": pytest.approx((0.6 * 0.4 / 5) ** 0.5),
            "mean_per_class_accuracy": pytest.approx(0.375),
            "expected_calibration_error": pytest.approx(0.3),
            "n": 5,
            "failed": 1,
            "evaluations_per_image": 10,
            "seconds_per_image": 0.5,
            "fill_rate": None,
            # tp, fp, fn of class 0 are 3, 1, 1, of class 1 0, 1, 0, of class 2 0, 0, 1.
            "macro_f1": pytest.approx(0.75 / 3),
            # Not without the posteriors.
            "top5_accuracy": None,
            "auroc": None,
            "nll": None,
            "brier": None,
            "standard_errors": {
                "accuracy": pytest.approx((0.6 * 0.4 / 5) ** 0.5),
                "mean_per_class_accuracy": pytest.approx((0.75 * 0.25 / 4) ** 0.5 / 2),
                # One bin: the accuracy's.
                "expected_calibration_error": pytest.approx((0.6 * 0.4 / 5) ** 0.5),
                # 2 / 8 less twice 0.75 / 8 for each hit, -0.75 / 8 for the others, times 5 / 3.
                "macro_f1": pytest.approx(
                    (3 * (0.3125 / 3) ** 2 + 2 * (0.46875 / 3) ** 2) ** 0.5 / 5
                ),
            },
            "groups": {},
        }

    @pytest.mark.parametrize("records", [[], [{"truth": 0, "error": "bad"}]])
    def test_nothing_to_summarise(self, records: list[dict]) -> None:
        found = summarise(records).to_dict()
        assert (found["n"], found["failed"]) == (0, len(records))
        assert found["accuracy"] is found["seconds_per_image"] is None

    def test_digits(self, tmp_path: Path, capsys) -> None:
        """The built-in model on real digits, with the settings that a newcomer gets."""
        arguments = ("evaluate", "--data", "digits", "--limit", 8, "--out", tmp_path / "run")
        said = call(capsys, *arguments, "--json")
        assert (said.code, said.err) == (0, "")
        summary = json.loads(said.out)
        assert summary.keys() == SUMMARY
        assert (summary["n"], summary["failed"]) == (8, 0)
        assert summary["accuracy"] >= 7 / 8
        assert 0 < summary["evaluations_per_image"] < 1000 and summary["seconds_per_image"] > 0
        assert 0 < summary["fill_rate"] <= 1

        # Resumed: nothing is left to compute, so no batch was filled.
        said = call(capsys, *arguments)
        assert said.out.startswith("accuracy  ") and len(said.out.splitlines()) == 11


class TestRecords:
    def test_folder(self, dit_dir: Path, folder: Path, tmp_path: Path, capsys) -> None:
        out = tmp_path / "run"
        said = call(
            capsys, "evaluate", "--model", dit_dir, "--data", folder, "--out", out,
            "--strategy", "enumerate", "--probes", 5, "--seed", 3, "--json",
        )  # fmt: skip
        assert (said.code, said.err) == (0, "")
        summary = json.loads(said.out)
        records = lines(out)
        assert {r["id"] for r in records} == {
            p.relative_to(folder).as_posix() for p in folder.rglob("*.png")
        }
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        for record in records:
            assert NAMES[record["truth"]] == record["id"].split("/")[0]
            (expected,) = clf(folder / record["id"], strategy="enumerate", probes=5, seed=3)
            assert record["index"] == expected.index and record["label"] == expected.label
            assert record["losses"] == pytest.approx(expected.losses.tolist(), rel=1e-4)
            assert record["evaluations"] == 20
        right = sum(r["index"] == r["truth"] for r in records)
        assert summary["accuracy"] == pytest.approx(right / 12)

        run = read_json(out / "run.json")
        assert run["environment"]["model"] and run["config"]["model"]["weights"]
        assert run["config"]["data"]["count"] == 12
        assert run["config"]["strategy"]["name"] == "enumerate"
        assert (run["config"]["probes"], run["config"]["seed"]) == (5, 3)
        assert run["environment"]["torch"] == torch.__version__

    @pytest.mark.parametrize("pair", [("images", "labels"), ("x_test", "y_test")])
    def test_npz(self, pair: tuple[str, str], dit_dir: Path, tmp_path: Path, capsys) -> None:
        labels = np.array([0, 1, 2, 3, 0])
        np.savez(tmp_path / "data.npz", **dict(zip(pair, (pixels(5), labels), strict=True)))
        out = tmp_path / "run"
        said = call(
            capsys, "evaluate", "--model", dit_dir, "--data", tmp_path / "data.npz", "--out", out,
            "--probes", 3, "--json",
        )  # fmt: skip
        assert (said.code, json.loads(said.out)["n"]) == (0, 5)
        assert [r["truth"] for r in sorted(lines(out), key=lambda r: r["id"])] == labels.tolist()

    def test_run_json_is_written_first(self, dit_dir: Path, tmp_path: Path) -> None:
        seen = []

        def load() -> np.ndarray:
            seen.append(read_json(tmp_path / "run" / "run.json"))
            return pixels(1)[0]

        data = DataSet("one", [Example("0", 0, load)], None)
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        evaluate(clf, data, tmp_path / "run", probes=2)
        assert len(seen) == 1 and seen[0]["config"]["probes"] == 2

    @pytest.mark.parametrize("progress", [False, True])
    def test_bad_image_among_good_ones(self, progress: bool, dit_dir, folder, tmp_path) -> None:
        (folder / "star" / "02.png").write_bytes(b"")
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        paths = sorted((folder / "star").iterdir())
        examples = [Example(p.name, 2, functools.partial(read_image, p)) for p in paths]
        data = DataSet("stars", examples, None)
        summary = evaluate(clf, data, tmp_path / "run", probes=2, progress=progress)
        assert (summary.n, summary.failed) == (2, 1)
        records = read_records(tmp_path / "run")
        assert records.keys() == {"02.png", "06.png", "10.png"}
        assert records["02.png"]["error"].startswith(f"{folder / 'star' / '02.png'}: ")

    def test_bad_images_on_the_command_line(self, dit_dir, folder, tmp_path, capsys) -> None:
        (folder / "star" / "02.png").write_bytes(b"")
        bad = folder / "cross" / "03.png"
        bad.write_bytes(bad.read_bytes()[:60])
        arguments = ("evaluate", "--model", dit_dir, "--data", folder, "--out", tmp_path / "run")
        said = call(capsys, *arguments, "--probes", 2, "--json")
        assert said.code == 2
        assert all(line.startswith(f"dive-fast: {folder}/") for line in said.err.splitlines())
        assert len(said.err.splitlines()) == 2
        summary = json.loads(said.out)
        assert (summary["n"], summary["failed"]) == (10, 2)
        assert sum("error" in record for record in lines(tmp_path / "run")) == 2

    def test_only_bad_images(self, dit_dir: Path, tmp_path: Path, capsys) -> None:
        np.savez(tmp_path / "d.npz", images=np.full((2, 8, 8), np.nan), labels=np.array([0, 1]))
        arguments = ("--model", dit_dir, "--data", tmp_path / "d.npz", "--out", tmp_path / "run")
        said = call(capsys, "evaluate", *arguments, "--json")
        assert said.code == 2
        assert said.err.splitlines()[1] == "dive-fast: 000001: expected finite pixels, " + (
            "got NaN or infinity."
        )
        assert json.loads(said.out)["accuracy"] is None
        assert call(capsys, "evaluate", *arguments).out.startswith("no image could be read")


class TestResume:
    def start(self, *arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "dive_fast", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Whoever runs the tests in the background has made their children deaf to it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def wait_for_lines(self, out: Path, process: subprocess.Popen, n: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "results.jsonl").exists():
                if (out / "results.jsonl").read_bytes().count(b"\n") >= n:
                    return
            time.sleep(0.01)
        pytest.fail(f"no {n} records came: {process.communicate()}")

    @pytest.mark.parametrize("kind", ["SIGKILL", "SIGINT"])
    def test_after_a_signal(self, kind: str, digit_model: Path, tmp_path: Path, capsys) -> None:
        """Nothing repeated, nothing lost, a torn last line dropped; the same answers."""
        out = tmp_path / "run"
        arguments = ("evaluate", "--model", digit_model, "--data", "digits", "--limit", 16)
        arguments += ("--strategy", "enumerate", "--probes", 40, "--json", "--out")
        # Small batches, so that it takes a while; they are no part of the configuration.
        process = self.start(*arguments, out, "--batch-size", 4)
        self.wait_for_lines(out, process, 3)
        process.send_signal(getattr(signal, kind))
        _, errors = process.communicate()
        if kind == "SIGINT":
            assert process.returncode == 130
            assert errors == f"dive-fast: interrupted; run again to go on from {out}.\n"
        before = (out / "results.jsonl").read_bytes()
        before = before[: before.rfind(b"\n") + 1]
        assert 3 <= before.count(b"\n") < 16
        with open(out / "results.jsonl", "ab") as file:
            file.write(b'{"id": "0000')

        said = call(capsys, *arguments, out)
        assert (said.code, said.err) == (0, "")
        assert json.loads(said.out)["n"] == 16
        assert (out / "results.jsonl").read_bytes().startswith(before)
        assert len({record["id"] for record in lines(out)}) == len(lines(out)) == 16

        assert call(capsys, *arguments, tmp_path / "whole").code == 0
        assert_same_answers(read_records(out), read_records(tmp_path / "whole"))

    def test_full_disk(self, dit_dir: Path, folder: Path, tmp_path: Path, capsys) -> None:
        """One sentence, the records before it are kept, and with room again it goes on."""
        out = tmp_path / "run"
        arguments = ("evaluate", "--model", dit_dir, "--data", folder, "--out", out, "--probes", 2)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
            said = call(capsys, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert_refused(said, r"results.jsonl: cannot be written \(File too large\)")
        kept = (out / "results.jsonl").read_bytes()
        assert 1 <= kept.count(b"\n") < 12 and kept.endswith(b"\n")
        assert call(capsys, *arguments).code == 0
        assert (out / "results.jsonl").read_bytes().startswith(kept)
        assert len(lines(out)) == 12

    def test_finished(self, dit_dir: Path, folder: Path, tmp_path: Path, capsys) -> None:
        """A finished run only prints its figures again, also after the data were moved."""
        arguments = ("--model", dit_dir, "--out", tmp_path / "run", "--probes", 2, "--json")
        first = call(capsys, "evaluate", "--data", folder, *arguments)
        content = (tmp_path / "run" / "results.jsonl").read_bytes()
        (tmp_path / "elsewhere").mkdir()
        moved = folder.rename(tmp_path / "elsewhere" / "data")
        again = call(capsys, "evaluate", "--data", moved, *arguments)
        # But for how full the batches were: there were none.
        filled = json.loads(first.out).pop("fill_rate")
        assert again == first._replace(out=first.out.replace(str(filled), "null"))
        assert (tmp_path / "run" / "results.jsonl").read_bytes() == content

    @pytest.mark.parametrize(
        ("change", "key"),
        [
            (["--seed", "1"], "seed is 0 there and 1 here"),
            (["--probes", "3"], "probes is 2 there and 3 here"),
            (["--strategy", "enumerate"], "strategy.name is 'auto' there and 'enumerate' here"),
            (["--dtype", "bfloat16"], "model.dtype is 'float32' there and 'bfloat16' here"),
            (["--timestep-embedding", "original"], "model.timestep_embedding is 'diffusers' there"),
            (["--limit", "5"], "data.count is 12 there and 5 here"),
        ],
        ids=words,
    )
    def test_another_configuration(self, change, key, dit_dir, folder, tmp_path, capsys) -> None:
        out = tmp_path / "run"
        arguments = (
            "evaluate",
            "--model",
            dit_dir,
            "--data",
            folder,
            "--out",
            out,
            "--probes",
            "2",
        )
        assert call(capsys, *arguments).code == 0
        content = (out / "results.jsonl").read_bytes()
        said = call(capsys, *arguments, *change)
        assert_refused(said, f"holds a run of another configuration: .*{key}.*choose another --out")
        assert (out / "results.jsonl").read_bytes() == content

    def test_other_weights(self, dit_dir: Path, folder: Path, tmp_path: Path, capsys) -> None:
        """The same place, but another model."""
        here = write_model(tmp_path / "model")
        arguments = ("evaluate", "--model", here, "--data", folder, "--out", tmp_path / "run")
        assert call(capsys, *arguments, "--probes", 2).code == 0
        write_model(here, seed=1)
        assert_refused(call(capsys, *arguments, "--probes", 2), "another configuration: .*weights")
