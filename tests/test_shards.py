"""Shards: which images each has, what tells a process its place, and the merged run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import assert_refused, call

from dive_fast import DiffusionClassifier, RunError
from dive_fast.data import open_dataset, select
from dive_fast.evaluation import evaluate, read_records
from dive_fast.evaluation.merging import merge
from dive_fast.evaluation.shards import Shard, launched

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
}  # fmt: skip


class TestShard:
    @pytest.mark.parametrize("n", [1, 2, 7, 16, 100])
    @pytest.mark.parametrize("of", [1, 2, 3, 16])
    def test_every_image_is_in_one_shard(self, n: int, of: int) -> None:
        held = [list(Shard(i, of).positions(n)) for i in range(1, min(of, n) + 1)]
        assert sorted(sum(held, [])) == list(range(n))
        assert max(map(len, held)) - min(map(len, held)) <= 1

    def test_more_shards_than_images(self) -> None:
        with pytest.raises(RunError, match="the shard 3/4 has no image: there are 2 in all"):
            Shard(3, 4).positions(2)

    @pytest.mark.parametrize("text", ["3/16", " 3 / 16 "])
    def test_read(self, text: str) -> None:
        assert Shard.read(text) == Shard(3, 16)

    @pytest.mark.parametrize("text", ["", "3", "3/", "a/b", "-1/4", "1.5/4", None, 3, "1/4/4"])
    def test_no_shard(self, text: object) -> None:
        with pytest.raises(RunError, match="expected a shard I/N such as 3/16, or auto, got"):
            Shard.read(text)

    @pytest.mark.parametrize("text", ["0/4", "5/4", "0/0"])
    def test_out_of_range(self, text: str) -> None:
        with pytest.raises(RunError, match="expected a shard I/N with I from 1 to N"):
            Shard.read(text)

    def test_folder(self) -> None:
        assert Shard(3, 16).folder("run") == Path("run/shard-03-of-16")
        assert Shard(3, 1000).folder("run") == Path("run/shard-0003-of-1000")

    @pytest.mark.parametrize(
        ("environment", "shard"), [(TORCHRUN, Shard(3, 4, 0)), (SRUN, Shard(6, 8, 1))]
    )
    def test_auto(self, environment: dict, shard: Shard) -> None:
        assert Shard.read("auto", environment) == shard

    def test_a_script_of_slurm_is_no_step(self) -> None:
        """sbatch sets a rank in the script itself, which is one process and not sixteen."""
        assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"}) is None
        with pytest.raises(RunError, match="found neither: give I/N"):
            Shard.read("auto", {})

    @pytest.mark.parametrize("value", ["", "x"])
    def test_broken_variables(self, value: str) -> None:
        with pytest.raises(RunError, match="of torchrun as numbers in the environment"):
            launched(TORCHRUN | {"RANK": value})

    def test_torchrun_itself(self, tmp_path: Path) -> None:
        """What the real launcher sets."""
        script = tmp_path / "place.py"
        script.write_text(
            "import os, pathlib\n"
            "from dive_fast.evaluation.shards import Shard\n"
            "shard = Shard.read('auto')\n"
            f"(pathlib.Path({str(tmp_path)!r}) / str(shard.index)).write_text(str(shard))\n"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run([*command, "--nproc-per-node", "2", str(script)], check=True, timeout=500)
        assert (tmp_path / "1").read_text() == "1/2" and (tmp_path / "2").read_text() == "2/2"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of 7 digits, and the same in 3 shards."""
    folder = tmp_path_factory.mktemp("shards")
    classifier = DiffusionClassifier.from_pretrained("digits")
    data = select(open_dataset("digits", classifier.names), 7, 0)
    evaluate(classifier, data, folder / "whole", probes=8)
    for i in (2, 3, 1):
        evaluate(classifier, data, folder / "parts", probes=8, shard=f"{i}/3")
    return {"whole": folder / "whole", "parts": folder / "parts"}


@pytest.fixture
def parts(whole: dict[str, Path], tmp_path: Path) -> Path:
    """The shards, to be spoilt."""
    return Path(shutil.copytree(whole["parts"], tmp_path / "parts"))


def shards(parts: Path) -> list[Path]:
    return sorted(parts.glob("shard-*"))


def rewrite(run: Path, **config: object) -> None:
    content = json.loads((run / "run.json").read_text())
    content["config"].update(config)
    (run / "run.json").write_text(json.dumps(content))


class TestMerge:
    def test_the_same_as_one_run(self, whole: dict[str, Path], parts: Path) -> None:
        assert [len(read_records(path)) for path in shards(parts)] == [3, 2, 2]
        assert merge([parts]) == parts
        mine, theirs = read_records(parts), read_records(whole["whole"])
        assert mine.keys() == theirs.keys()
        for key, record in theirs.items():
            for name in ("index", "truth", "n_probes", "evaluations"):
                assert mine[key][name] == record[name]
            for a, b in zip(mine[key]["losses"], record["losses"], strict=True):
                assert a == (b if b is None else pytest.approx(b, rel=1e-4))
        config = json.loads((parts / "run.json").read_text())["config"]
        assert config == json.loads((whole["whole"] / "run.json").read_text())["config"]

    def test_a_run_without_shards_goes_on_with_it(self, parts: Path) -> None:
        merge([parts])
        before = (parts / "results.jsonl").read_bytes()
        classifier = DiffusionClassifier.from_pretrained("digits")
        data = select(open_dataset("digits", classifier.names), 7, 0)
        assert evaluate(classifier, data, parts, probes=8).n == 7
        assert (parts / "results.jsonl").read_bytes() == before

    def test_twice(self, parts: Path) -> None:
        merge([parts])
        before = (parts / "results.jsonl").read_bytes()
        merge([parts])
        assert (parts / "results.jsonl").read_bytes() == before

    def test_runs_one_by_one(self, parts: Path, tmp_path: Path) -> None:
        one, two, three = shards(parts)
        assert merge([three, one, two], tmp_path / "out") == tmp_path / "out"
        assert len(read_records(tmp_path / "out")) == 7
        with pytest.raises(RunError, match="expected --out DIR"):
            merge([one, two, three])

    def test_a_shard_is_missing(self, parts: Path) -> None:
        shutil.rmtree(shards(parts)[1])
        with pytest.raises(RunError, match="expected the shards 1 to 3, and 2 of 3 is missing"):
            merge([parts])

    def test_an_image_is_missing(self, parts: Path) -> None:
        results = shards(parts)[0] / "results.jsonl"
        lines = results.read_text().splitlines(keepends=True)
        missing = json.loads(lines[-1])["id"]
        results.write_text("".join(lines[:-1]))
        with pytest.raises(RunError, match=f"1 of 3 images are missing, '{missing}'; run its"):
            merge([parts])
        assert not (parts / "run.json").exists()

    def test_a_shard_twice(self, parts: Path, tmp_path: Path) -> None:
        again = shutil.copytree(shards(parts)[0], tmp_path / "again")
        with pytest.raises(RunError, match="are both the shard 1/3: the images '.*' would be doub"):
            merge([parts, again], tmp_path / "out")
        with pytest.raises(RunError, match="expected each run once"):
            merge([parts, shards(parts)[0]], tmp_path / "out")

    def test_an_image_of_another_shard(self, parts: Path) -> None:
        one, two, _ = shards(parts)
        line = (two / "results.jsonl").read_text().splitlines()[0]
        with (one / "results.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(RunError, match=f"the images '{json.loads(line)['id']}' are not of the"):
            merge([parts])

    def test_images_doubled(self, parts: Path) -> None:
        one, two, _ = shards(parts)
        content = json.loads((two / "run.json").read_text())
        content["images"] = json.loads((one / "run.json").read_text())["images"]
        (two / "run.json").write_text(json.dumps(content))
        shutil.copy(one / "results.jsonl", two / "results.jsonl")
        with pytest.raises(RunError, match="the image '.*' is doubled: in .*01-of-03 and .*02-of"):
            merge([parts])

    def test_other_configurations(self, parts: Path) -> None:
        rewrite(shards(parts)[2], seed=5)
        with pytest.raises(RunError, match="does not belong to .*: seed is 0 there and 5 here"):
            merge([parts])

    def test_other_numbers_of_shards(self, parts: Path) -> None:
        rewrite(shards(parts)[2], shard="3/4")
        with pytest.raises(RunError, match="it is of 3 shards there and of 4 here"):
            merge([parts])

    def test_other_versions_are_told(self, parts: Path, caplog) -> None:
        path = shards(parts)[1] / "run.json"
        content = json.loads(path.read_text())
        content["environment"]["torch"] = "1.0"
        path.write_text(json.dumps(content))
        merge([parts])
        assert "torch 1.0: answers may differ" in caplog.text
        told = json.loads((parts / "run.json").read_text())["shards"]
        assert [one["shard"] for one in told] == ["1/3", "2/3", "3/3"]
        assert told[1]["environments"][0]["torch"] == "1.0"

    def test_a_whole_run(self, whole: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(RunError, match="expected the run of a shard .*, got a whole run"):
            merge([whole["whole"]], tmp_path / "out")

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="expected the run of a shard or a folder of such"):
            merge([tmp_path / "none"], tmp_path / "out")

    def test_failures_count_as_there(self, parts: Path) -> None:
        """An image that cannot be read has its record, and can be mended in the merged run."""
        results = shards(parts)[0] / "results.jsonl"
        lines = results.read_text().splitlines()
        failed = {k: v for k, v in json.loads(lines[0]).items() if k in ("id", "truth")}
        lines[0] = json.dumps({**failed, "error": "gone"})
        results.write_text("\n".join(lines) + "\n")
        merge([parts])
        assert read_records(parts)[failed["id"]]["error"] == "gone"

    def test_a_run_begun_beside_shards(self, parts: Path) -> None:
        classifier = DiffusionClassifier.from_pretrained("digits")
        data = select(open_dataset("digits", classifier.names), 7, 0)
        with pytest.raises(RunError, match="holds 3 runs of shards: 'dive-fast merge"):
            evaluate(classifier, data, parts, probes=8)


class TestCommands:
    def test_evaluate_and_merge(self, tmp_path: Path, capsys) -> None:
        arguments = ("evaluate", "--data", "digits", "--limit", 4, "--probes", 4)
        for shard in ("1/2", "2/2"):
            said = call(capsys, *arguments, "--out", tmp_path / "run", "--shard", shard)
            assert said.code == 0 and "images                   2" in said.out
        said = call(capsys, "merge", tmp_path / "run", "--json")
        assert said.code == 0 and json.loads(said.out)["n"] == 4
        said = call(capsys, *arguments, "--out", tmp_path / "run")
        assert "images                   4" in said.out

    def test_detector(self, tmp_path: Path, capsys, scenes_model: Path) -> None:
        arguments = ("evaluate", "--data", "scenes", "--model", scenes_model, "--limit", 2)
        arguments += ("--probes", 2, "--set", "rounds=1", "--prior", "none")
        arguments = (*arguments, "--out", tmp_path / "run")
        for shard in ("1/2", "2/2"):
            assert call(capsys, *arguments, "--shard", shard).code == 0
        said = call(capsys, "merge", tmp_path / "run")
        assert said.code == 0 and "the same options scores it" in said.out
        said = call(capsys, *arguments, "--json")
        assert said.code == 0 and json.loads(said.out)["n"] == 2

    @pytest.mark.parametrize("shard", ["5/4", "x", "auto"])
    def test_bad_shard(self, tmp_path: Path, capsys, shard: str) -> None:
        arguments = ("evaluate", "--data", "digits", "--out", tmp_path / "run", "--shard", shard)
        assert_refused(call(capsys, *arguments), "shard")
        assert not (tmp_path / "run").exists()

    def test_launched_without_shard(self, tmp_path: Path, capsys, monkeypatch) -> None:
        for name, value in TORCHRUN.items():
            monkeypatch.setenv(name, value)
        arguments = ("evaluate", "--data", "digits", "--limit", 1, "--probes", 4)
        said = call(capsys, *arguments, "--out", tmp_path)
        assert said.code == 0 and "this is process 3 of 4" in said.err
