"""Pictures that belong together stay on one side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from PIL import Image
from tiny_classes import train

from dive_fast.errors import DataError, DiveFastError
from dive_fast.training.classes_parts import divided_by_group, groups_of

NAMES = ("cat", "dog", "cow")


def tell_nothing(sentence: str) -> None:
    raise AssertionError(sentence)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_in_one_part(seed: int) -> None:
    """Of groups of 1 to 5 pictures of several classes; the shares are about those asked for."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, size=80)
    groups = [str(g) for g in np.repeat(np.arange(80), sizes)]
    labels = torch.from_numpy(rng.integers(3, size=len(groups)))
    parts = divided_by_group(labels, groups, NAMES, 0.3, seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(groups)))
    held = [{groups[i] for i in part.tolist()} for part in parts]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    for c in range(3):
        n = (labels == c).sum().item()
        for part in parts[1:]:
            assert abs((labels[part] == c).sum().item() - 0.15 * n) <= 7
    again = divided_by_group(labels, groups, NAMES, 0.3, seed)
    assert all(map(torch.equal, parts, again))


def test_three_groups_of_a_class_are_enough() -> None:
    """One in each part, though one is large; fewer are refused."""
    labels = torch.tensor([0] * 12 + [1] * 3)
    groups = [*"aaaaaaaaaabc", *"xyz"]
    parts = divided_by_group(labels, groups, NAMES[:2], 0.15, 0)
    for part in parts:
        assert set(labels[part].tolist()) == {0, 1}
    with pytest.raises(DataError, match="of 3 groups or more of every class.* fewer of 'dog'"):
        divided_by_group(labels, [*groups[:-1], "y"], NAMES[:2], 0.15, 0)


def test_groups_of_names() -> None:
    """The file's name counts, not its folder; the first group of the expression if it has one."""
    ids = ["7/12-a.png", "8/12-b.png", "7/13.png"]
    found = groups_of(ids, r"^(\d+)-?", tell_nothing)
    assert found[0] == found[1] != found[2]
    whole = groups_of(ids, r"\d+-?[ab]?", tell_nothing)
    assert len(set(whole)) == 3
    said: list[str] = []
    alone = groups_of([*ids, "7/x.png", "7/y.png"], r"\d+", said.append)
    assert len(set(alone)) == 4
    assert said == ["2 pictures are in no group, such as 7/x.png."]
    # A picture alone is no group that is called like it.
    assert len(set(groups_of(["a", "b/a1"], r"(a)\d", said.append))) == 2


def test_bad_expressions() -> None:
    with pytest.raises(DiveFastError, match="a regular expression .* got .*unterminated"):
        groups_of(["a"], "(", tell_nothing)
    with pytest.raises(DataError, match="finds something, got 'a', 'b'"):
        groups_of(["a", "b"], r"\d", tell_nothing)


def test_training_by_groups(tmp_path: Path, capsys) -> None:
    """Two pieces of each photograph; another grouping is another training."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for name in NAMES:
        (data / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / name / f"{name}{i // 2}-{i % 2}.png")
    trained = train(data, tmp_path / "out", held_out=0.5, group_by=r"^\w+")
    assert trained.parts == (12, 6, 6)
    (tmp_path / "out" / "dive_fast.json").unlink()
    arguments = ["--data", data, "--out", tmp_path / "out", "--size", 8, "--patch-size", 4]
    said = call(capsys, "train-classes", *arguments, "--group-by", "[01][.]png", "--threads", 1)
    assert_refused(said, "expected pictures of 3 groups or more of every class")
    assert torch.get_num_threads() == 1
