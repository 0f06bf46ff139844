"""Which files the arguments of a command mean."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from dive_fast.data.paths import LeftOut, expand_inputs, list_images
from dive_fast.errors import ImageError

SYSTEMS_OWN = (
    "__MACOSX", "@eaDir", "$RECYCLE.BIN", "__pycache__", "lost+found", "System Volume Information"
)  # fmt: skip


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

    def test_what_is_left_out_is_told_in_one_line(self, folder: Path, caplog) -> None:
        (folder / "b.txt").touch()
        (folder / "table.json").touch()
        (folder / "Thumbs.db").touch()
        (folder / "gone").symlink_to(folder / "nowhere")
        with caplog.at_level(logging.WARNING):
            good([str(folder)])
        (line,) = caplog.messages
        assert line.startswith(f"{folder}: left out ")
        assert "3 without an image's suffix (.txt, .json)" in line
        for part in ("1 hidden", "1 the system's own", "1 linked to nothing", "1 sub-folder(s)"):
            assert part in line

    def test_nothing_left_out_is_not_told(self, tmp_path: Path, caplog) -> None:
        for name in ("a.png", "b.JFIF", "c.jpe", "d.jp2", "e.pbm"):
            (tmp_path / name).touch()
        assert len(good([str(tmp_path)])) == 5 and not caplog.messages

    def test_a_folder_without_images_says_what_it_has(self, folder: Path) -> None:
        for name in ("b.png", "a.JPG", "[1].png"):
            (folder / name).unlink()
        ((_, error),) = expand_inputs([str(folder)])
        assert "got none (1 without an image's suffix (.txt), 1 sub-folder(s), 1 hidden" in str(
            error
        )

    def test_folders_of_a_pattern_are_told(self, folder: Path, caplog) -> None:
        assert len(good([str(folder / "*.png")])) == 2
        assert caplog.messages == [f"{folder}/*.png: left out 1 folder(s)."]


class TestListImages:
    """Below a folder, as a class of a data set is read."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "class" / "inner").mkdir(parents=True)
        (tmp_path / "class" / "a.png").touch()
        (tmp_path / "class" / "inner" / "b.png").touch()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "c.png").touch()
        return tmp_path / "class"

    def listed(self, folder: Path) -> tuple[list[str], str]:
        """Paths below the folder, and what was left out."""
        left = LeftOut()
        found = list_images(folder, recursive=True, left=left)
        return [path.relative_to(folder).as_posix() for path in found], str(left)

    def test_linked_folders_and_files_count(self, folder: Path) -> None:
        (folder / "more").symlink_to(folder.parent / "other")
        (folder / "d.png").symlink_to(folder.parent / "other" / "missing.png")
        # A link to nothing with an image's suffix is one record's error.
        assert self.listed(folder) == (["a.png", "d.png", "inner/b.png", "more/c.png"], "")

    @pytest.mark.parametrize("target", [".", "..", "inner/..", "../class", "/"])
    def test_loops_end(self, folder: Path, target: str) -> None:
        (folder / "inner" / "loop").symlink_to(folder / target)
        names, left = self.listed(folder)
        assert names == ["a.png", "inner/b.png"]
        assert left == "1 linked back to a folder that contains them"

    def test_two_folders_that_link_to_each_other(self, folder: Path) -> None:
        (folder / "more").symlink_to(folder.parent / "other")
        (folder.parent / "other" / "back").symlink_to(folder)
        (folder.parent / "other" / "self").symlink_to(folder.parent / "other")
        names, left = self.listed(folder)
        assert names == ["a.png", "inner/b.png", "more/c.png"]
        assert left == (
            "1 linked back to a folder that contains them, "
            "1 linked to folders that are there already"
        )

    def test_no_file_counts_twice(self, folder: Path) -> None:
        """The path without links stays, whichever comes first."""
        (folder / "0").symlink_to(folder / "inner")
        (folder / "0.png").symlink_to(folder / "a.png")
        (folder / "more").symlink_to(folder.parent / "other")
        (folder / "more2").symlink_to(folder.parent / "other")
        (folder / "c.png").symlink_to(folder.parent / "other" / "c.png")
        names, left = self.listed(folder)
        assert names == ["a.png", "inner/b.png", "more/c.png"]
        assert "2 linked to folders that are there" in left and "2 linked to files that are" in left

    @pytest.mark.parametrize("name", [*SYSTEMS_OWN, ".ipynb_checkpoints", ".git"])
    def test_folders_of_the_system(self, folder: Path, name: str) -> None:
        (folder / name).mkdir()
        (folder / name / "x.png").touch()
        names, left = self.listed(folder)
        assert names == ["a.png", "inner/b.png"]
        assert left == ("1 hidden" if name[0] == "." else "1 the system's own")

    @pytest.mark.parametrize("name", ["._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r"])
    def test_files_of_the_system(self, folder: Path, name: str) -> None:
        (folder / name).touch()
        names, left = self.listed(folder)
        assert names == ["a.png", "inner/b.png"] and left.startswith("1 ")

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read all")
    def test_a_folder_that_may_not_be_read(self, folder: Path) -> None:
        (folder / "inner").chmod(0)
        with pytest.raises(ImageError, match="cannot be read"):
            self.listed(folder)

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    def test_names_that_are_no_text(self, folder: Path) -> None:
        (folder / "\udcff.png").touch()
        assert self.listed(folder) == (["a.png", "inner/b.png", "\udcff.png"], "")
