"""Which files the arguments of a command mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from dive_fast.data.paths import expand_inputs
from dive_fast.errors import ImageError


def good(arguments: list[str]) -> list[str]:
    """The files of arguments that all give some."""
    found = expand_inputs(arguments)
    assert [error for _, error in found] == [None] * len(found)
    return [path for path, _ in found]


class TestExpandInputs:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "[1].png"):
            (tmp_path / name).touch()
        (tmp_path / "inner.png").mkdir()
        (tmp_path / "inner.png" / "c.png").touch()
        return tmp_path

    def test_folder(self, folder: Path) -> None:
        names = [Path(path).name for path in good([str(folder)])]
        assert names == ["[1].png", "a.JPG", "b.png"]

    def test_files_keep_their_order(self, folder: Path) -> None:
        arguments = [str(folder / "notes.txt"), str(folder / "b.png"), str(folder / "a.JPG")]
        assert good(arguments) == arguments

    def test_pattern_gives_files_only(self, folder: Path) -> None:
        found = good([str(folder / "?*.png")])
        assert [Path(path).name for path in found] == ["[1].png", "b.png"]

    def test_a_file_goes_before_the_pattern_its_name_is(self, folder: Path) -> None:
        assert good([str(folder / "[1].png")]) == [str(folder / "[1].png")]

    @pytest.mark.parametrize(
        "argument, message",
        [
            ("missing.png", "no such file"),
            ("*.bmp", "files of this pattern"),
            ("empty", "images in this folder"),
        ],
    )
    def test_nothing_found(self, folder: Path, argument: str, message: str) -> None:
        """An argument that gives none keeps its place, and the others are found."""
        (folder / "empty").mkdir()
        arguments = [str(folder / name) for name in ("b.png", argument, "a.JPG")]
        found = expand_inputs(arguments)
        assert [path for path, _ in found] == arguments
        assert [error is None for _, error in found] == [True, False, True]
        assert isinstance(found[1][1], ImageError)
        assert str(found[1][1]).startswith(arguments[1]) and message in str(found[1][1])
