"""Which files the arguments of a command mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from dive_fast.data.paths import expand_inputs
from dive_fast.errors import ImageError


class TestExpandInputs:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "[1].png"):
            (tmp_path / name).touch()
        (tmp_path / "inner.png").mkdir()
        (tmp_path / "inner.png" / "c.png").touch()
        return tmp_path

    def test_folder(self, folder: Path) -> None:
        names = [path.name for path in expand_inputs([str(folder)])]
        assert names == ["[1].png", "a.JPG", "b.png"]

    def test_files_keep_their_order(self, folder: Path) -> None:
        arguments = [str(folder / "notes.txt"), str(folder / "b.png"), str(folder / "a.JPG")]
        assert expand_inputs(arguments) == [Path(a) for a in arguments]

    def test_pattern_gives_files_only(self, folder: Path) -> None:
        assert [p.name for p in expand_inputs([str(folder / "?*.png")])] == ["[1].png", "b.png"]

    def test_a_file_goes_before_the_pattern_its_name_is(self, folder: Path) -> None:
        assert expand_inputs([str(folder / "[1].png")]) == [folder / "[1].png"]

    @pytest.mark.parametrize(
        "argument, message",
        [
            ("missing.png", "no such file"),
            ("*.bmp", "files of this pattern"),
            ("empty", "pictures in this folder"),
        ],
    )
    def test_nothing_found(self, folder: Path, argument: str, message: str) -> None:
        (folder / "empty").mkdir()
        with pytest.raises(ImageError, match=message):
            expand_inputs([str(folder / "b.png"), str(folder / argument)])

    def test_no_arguments(self) -> None:
        pytest.raises(ImageError, expand_inputs, []).match("at least one picture")
