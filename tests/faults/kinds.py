"""Every kind of input: good files of it, and how one of them is damaged and used."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.faults import mutate, pictures

PROBES = ("--probes", "1")
CLASSIFY = ("--strategy", "enumerate", *PROBES, "--json")


class Inputs:
    """Good inputs of every kind, below one folder; made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        """Writes all of them."""
        from ldm_reference import SMALL, make_state
        from tiny import write_model
        from tiny_layout import make_layout_model
        from tiny_sd import write_sd

        from dive_fast import zoo

        write_model(self.folder / "dit")
        write_model(self.folder / "latent-dit", vae=True)
        write_sd(self.folder / "sd")
        make_layout_model(vae="kl").save_pretrained(self.folder / "layout")
        shutil.copytree(zoo.path("digits"), self.folder / "digits")
        torch.save({"state_dict": make_state(SMALL), "epoch": 3}, self.folder / "model.ckpt")
        for name, write in (("good", pictures.good), ("foreign", pictures.foreign)):
            (self.folder / name).mkdir()
            list(write(self.folder / name))
        self._make_data()
        self._make_lists()
        self._make_run()

    @property
    def picture(self) -> str:
        return str(self.folder / "good" / "rgb.png")

    def _make_data(self) -> None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (4, 8, 8), dtype=np.uint8)
        np.savez(self.folder / "data.npz", images=images, labels=np.arange(4))
        folder = self.folder / "coco"
        folder.mkdir()
        entries, boxes = [], []
        for number in (1, 2):
            shutil.copy(self.picture, folder / f"{number}.png")
            entries.append({"id": number, "width": 12, "height": 9, "file_name": f"{number}.png"})
            for category in (1, 2, 3):
                boxes.append(
                    {
                        "id": len(boxes) + 1, "image_id": number, "category_id": category,
                        "bbox": [category, 1, 5.5, 4], "area": 22.0, "iscrowd": 0,
                    }
                )  # fmt: skip
        names = enumerate(("one", "two", "three"), start=1)
        content = {
            "info": {"description": "two pictures"},
            "images": entries,
            "annotations": boxes,
            "categories": [{"id": i, "name": name, "supercategory": "number"} for i, name in names],
        }
        (self.folder / "coco.json").write_text(json.dumps(content))

    def _make_lists(self) -> None:
        folder = self.folder / "lists"
        folder.mkdir()
        (folder / "names.txt").write_text("cat\ndog\nhot dog\n")
        (folder / "prompts.csv").write_text(
            "prompt,classname,classidx\na photo of a cat.,cat,0\n"
            '"a cat, asleep.",cat,0\na photo of a dog.,dog,1\n"a dog, awake",dog,1\n'
        )
        (folder / "names.tsv").write_text("classidx\tclassname\n0\tcat\n1\tdog\n")
        (folder / "names.json").write_text(json.dumps({"0": "cat", "1": "dog"}))
        (folder / "prompts.json").write_text(
            json.dumps({"cat": ["a cat.", "cats."], "dog": ["a dog.", "dogs."]})
        )
        (folder / "names.yaml").write_text("names:\n  0: cat\n  1: dog\n")

    def _make_run(self) -> None:
        from dive_fast.cli import main

        for command in (
            self._evaluate(self.folder / "run"),
            self._detect(self.folder / "coco.json", self.folder / "detection-run"),
        ):
            if main(command) != 0:
                raise RuntimeError("a good run failed")

    def _evaluate(self, out: Path) -> list[str]:
        model = ("--model", str(self.folder / "dit"))
        return [
            "evaluate",
            "--data",
            str(self.folder / "data.npz"),
            *model,
            "--out",
            str(out),
            *CLASSIFY,
        ]

    def _detect(self, data: Path, out: Path) -> list[str]:
        return [
            "evaluate", "--data", str(data), "--images", str(self.folder / "coco"), "--json",
            "--model", str(self.folder / "layout"), "--out", str(out), "--prior", "none",
            "--strategy", "invert", "--set", "steps=1", *PROBES,
        ]  # fmt: skip

    # -- one damaged input each: writes below ``work`` and gives the command's arguments ---------

    def damaged_picture(self, work: Path, rng: random.Random) -> list[str]:
        source = rng.choice(sorted((self.folder / "good").iterdir()))
        target = work / source.name
        target.write_bytes(mutate.damage_bytes(source.read_bytes(), rng))
        return ["classify", str(target), "--model", str(self.folder / "dit"), *CLASSIFY]

    def foreign_picture(self, work: Path, rng: random.Random) -> list[str]:
        source = rng.choice(sorted((self.folder / "foreign").iterdir()))
        folder = work / "data" / rng.choice(("circle", "star"))
        folder.mkdir(parents=True)
        shutil.copy(self.picture, folder / "good.png")
        content = source.read_bytes()
        if rng.random() < 0.3:
            content = mutate.damage_bytes(content, rng)
        (folder / source.name).write_bytes(content)
        model = ("--model", str(self.folder / "dit"))
        if rng.random() < 0.5:
            return ["classify", str(folder / source.name), *model, *CLASSIFY]
        return [
            "evaluate",
            "--data",
            str(work / "data"),
            "--out",
            str(work / "run"),
            *model,
            *CLASSIFY,
        ]

    def model_json(self, work: Path, rng: random.Random) -> list[str]:
        return self._with_model(
            work, rng, "*.json", mutate.damage_json, ("dit", "latent-dit", "sd", "layout")
        )

    def weights(self, work: Path, rng: random.Random) -> list[str]:
        return self._with_model(
            work,
            rng,
            "*.safetensors",
            mutate.damage_safetensors,
            ("dit", "latent-dit", "sd", "layout"),
        )

    def fitted(self, work: Path, rng: random.Random) -> list[str]:
        return self._with_model(work, rng, "dive_fast.json", mutate.damage_json, ("digits",))

    def npz(self, work: Path, rng: random.Random) -> list[str]:
        data = work / "data.npz"
        data.write_bytes(mutate.damage_npz((self.folder / "data.npz").read_bytes(), rng))
        return [
            "evaluate", "--data", str(data), "--model", str(self.folder / "dit"),
            "--out", str(work / "run"), *CLASSIFY,
        ]  # fmt: skip

    def coco(self, work: Path, rng: random.Random) -> list[str]:
        data = work / "coco.json"
        data.write_bytes(mutate.damage_json((self.folder / "coco.json").read_bytes(), rng))
        return self._detect(data, work / "run")

    def class_list(self, work: Path, rng: random.Random) -> list[str]:
        source = rng.choice(sorted((self.folder / "lists").iterdir()))
        damage = mutate.damage_text
        if source.suffix == ".json" and rng.random() < 0.7:
            damage = mutate.damage_json
        target = work / source.name
        target.write_bytes(damage(source.read_bytes(), rng))
        return [
            "classify", self.picture, "--model", str(self.folder / "sd"), "--classes", str(target),
            *CLASSIFY,
        ]  # fmt: skip

    def run(self, work: Path, rng: random.Random) -> list[str]:
        detection = rng.random() < 0.4
        shutil.copytree(self.folder / ("detection-run" if detection else "run"), work / "run")
        name, damage = rng.choice(
            (("results.jsonl", mutate.damage_json_lines), ("run.json", mutate.damage_json))
        )
        path = work / "run" / name
        path.write_bytes(damage(path.read_bytes(), rng))
        if detection:
            return self._detect(self.folder / "coco.json", work / "run")
        return self._evaluate(work / "run")

    def checkpoint(self, work: Path, rng: random.Random) -> list[str]:
        path = work / "model.ckpt"
        good = self.folder / "model.ckpt"
        if rng.random() < 0.5:
            path.write_bytes(mutate.damage_bytes(good.read_bytes(), rng))
        else:
            torch.save(mutate.damage_state(torch.load(good), rng), path)
        return ["convert", str(path), "--out", str(work / "model"), "--latent-size", "8"]

    def _with_model(
        self,
        work: Path,
        rng: random.Random,
        pattern: str,
        damage: mutate.Mutation,
        models: tuple[str, ...],
    ) -> list[str]:
        name = rng.choice(models)
        model = work / name
        shutil.copytree(self.folder / name, model)
        path = rng.choice(sorted(model.rglob(pattern)))
        path.write_bytes(damage(path.read_bytes(), rng))
        if name == "layout":
            return [
                "detect", self.picture, "--model", str(model), "--out", str(work / "run"),
                "--strategy", "invert", "--set", "steps=1", *PROBES, "--json",
            ]  # fmt: skip
        classes = ("--classes", "cat,dog") if name == "sd" else ()
        return ["classify", self.picture, "--model", str(model), *classes, *CLASSIFY]


KINDS: dict[str, Callable[[Inputs, Path, random.Random], list[str]]] = {
    "picture": Inputs.damaged_picture,
    "foreign": Inputs.foreign_picture,
    "model": Inputs.model_json,
    "weights": Inputs.weights,
    "fitted": Inputs.fitted,
    "npz": Inputs.npz,
    "coco": Inputs.coco,
    "classes": Inputs.class_list,
    "run": Inputs.run,
    "checkpoint": Inputs.checkpoint,
}
