"""What a page is made of: parts of a run, labels, settings, drawings, thumbnails."""

from __future__ import annotations

import base64
import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pictures import noise_picture
from PIL import Image
from report_runs import answer, write_run

pytest.importorskip("matplotlib", reason="reports need matplotlib")
pytest.importorskip("sklearn", reason="reports need scikit-learn")

from dive_fast.evaluation.table import table_of  # noqa: E402
from dive_fast.report import classes, configuration, plots, svg  # noqa: E402
from dive_fast.report.curves import by_evaluations  # noqa: E402
from dive_fast.report.examples import closest, worst  # noqa: E402
from dive_fast.report.parts import best_of, number, percent  # noqa: E402
from dive_fast.report.runs import read_runs  # noqa: E402
from dive_fast.report.thumbnails import thumbnail  # noqa: E402


def table(evaluations: list[int], right: list[bool]):
    return table_of(
        [
            answer(str(i), 0, [0.6, 0.4] if hit else [0.4, 0.6], evaluations=n)
            for i, (n, hit) in enumerate(zip(evaluations, right, strict=True))
        ]
    )


class TestByEvaluations:
    def test_equal_numbers_stay_together(self) -> None:
        parts = by_evaluations(table([5] * 7 + [9, 11, 30], [True] * 5 + [False] * 5), 3)
        assert [(p.least, p.most, p.n, p.accuracy) for p in parts] == [
            (5, 5, 7, pytest.approx(5 / 7)), (9, 30, 3, 0.0),
        ]  # fmt: skip
        assert parts[1].mean == pytest.approx(50 / 3)

    @pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100, 1001])
    def test_every_image_is_in_one_part(self, n: int) -> None:
        rng = np.random.default_rng(n)
        evaluations = rng.integers(1, 300, n).tolist()
        right = (rng.random(n) < 0.5).tolist()
        parts = by_evaluations(table(evaluations, right))
        assert sum(p.n for p in parts) == n and len(parts) <= 8
        assert sum(p.n * p.accuracy for p in parts) == pytest.approx(sum(right))
        assert sum(p.n * p.mean for p in parts) == pytest.approx(sum(evaluations))
        assert all(a.most < b.least for a, b in pairwise(parts))
        if n > 500:
            assert max(p.n for p in parts) < 1.3 * min(p.n for p in parts)


def test_worst_and_closest() -> None:
    records = [
        answer("0", 0, [0.9, 0.1, 0.0]),
        answer("1", 1, [0.7, 0.2, 0.1]),
        answer("2", 1, [0.8, 0.2, 0.0]),
        answer("3", 2, [0.0, 0.0, 1.0]),  # no second class was measured
        answer("4", 0, [0.4, 0.3, 0.3]),
    ]
    assert worst(table_of(records), 5).tolist() == [2, 1]
    assert worst(table_of(records), 1).tolist() == [2]
    assert closest(table_of(records), 9).tolist() == [4, 1, 2, 0]
    assert closest(table_of(records), 0).tolist() == []


def test_labels_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name) for name in ("a/auto", "b/auto", "b/race")]
    assert [r.label for r in read_runs(paths)] == ["a/auto", "b/auto", "b/race"]
    assert [r.label for r in read_runs(paths[1:])] == ["auto", "race"]
    assert [r.series for r in read_runs(paths)] == [0, 1, 2]


def test_pairs_of_many_classes(tmp_path: Path) -> None:
    """No matrix of 41 classes, but who is taken for whom, the most frequent first."""
    names = [f"c{i}" for i in range(41)]

    def one(key: int, truth: int, said: int) -> dict:
        p = [0.01] * 41
        p[said] = 0.6
        return answer(str(key), truth, p, names)

    pairs = [(3, 4), (3, 4), (3, 3), (40, 0), (1, 1)]
    run = write_run(tmp_path / "run", [one(i, *pair) for i, pair in enumerate(pairs)], names)
    (part,) = classes.confusion_section(read_runs([run])).parts
    assert part.kind == "table" and "2 most frequent of 2 pairs" in part.caption
    assert [[c.text for c in row] for row in part.rows] == [
        ["c3", "c4", "2", "66.7%"], ["c40", "c0", "1", "100.0%"],
    ]  # fmt: skip
    table, left_out = classes.class_section(read_runs([run])).parts
    assert [row[0].text for row in table.rows] == ["c0", "c1", "c3", "c4", "c40"]
    assert left_out.text.startswith("36 more classes")


def test_steps_of_the_matrix(tmp_path: Path) -> None:
    """The more of a row, the stronger; what is none has no colour."""
    records = [answer(str(i), 0, [0.6, 0.4]) for i in range(99)] + [answer("x", 0, [0.4, 0.6])]
    run = write_run(tmp_path / "run", [{**r} for r in records], ("ant", "bee"))
    (heat,) = classes.confusion_section(read_runs([run])).parts
    assert heat.cells == [[(99, 6), (1, 1)], [(0, 0), (0, 0)]]


def test_settings(tmp_path: Path) -> None:
    """Keys in dots; one that a run lacks differs; long lists are cut."""
    one = write_run(tmp_path / "one", timesteps={"weights": [0.123456] * 40}, beta=True)
    other = write_run(tmp_path / "other", timesteps={"weights": [0.5]}, beta=1, more="x")
    _, different, folded = configuration.section(read_runs([one, other])).parts
    rows = {row[0].text: [c.text for c in row[1:]] for row in different.rows}
    assert set(rows) == {"timesteps.weights", "beta", "more"}
    assert rows["beta"] == ["true", "1"] and rows["more"] == ["–", "x"]
    assert (
        rows["timesteps.weights"][0].endswith("(40 values)")
        and len(rows["timesteps.weights"][0]) < 120
    )
    keys = [row[0].text for row in folded.parts[0].rows]
    assert {"strategy.name", "environment.torch", "data.count"} <= set(keys)


def test_same_settings(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    assert configuration.section(runs).parts[1].text == "The runs have the same settings."


def test_numbers_as_text() -> None:
    assert percent(0.92749, 0.0151) == "92.7% ± 1.5" and percent(None) == "–"
    assert number(1234.5678, 1) == "1,234.6" and number(float("nan")) == "–"
    assert best_of([0.5, None, 0.7, 0.7], higher=True) == [False, False, True, True]
    assert best_of([0.5, 0.5], higher=True) == [False, False]
    assert best_of([3, 2], higher=False) == [False, True]


class TestDrawings:
    SOURCE = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
      width="9pt" viewBox="0 0 9 9" version="1.1"><metadata>x</metadata>
      <defs><style>*{fill:red}</style>
      <path id="m1" d="M 0 0
L 1 1"/></defs><g id="axes_1" clip-path="url(#c1)"><use xlink:href="#m1" style="fill: #000002"/>
      <clipPath id="c1"/><text style="font-family: 'X'; fill: #0000f0">a &lt; b</text></g></svg>"""

    def test_inline(self) -> None:
        found = svg.inline(self.SOURCE, "name")
        assert 'id="name-m1"' in found and 'href="#name-m1"' in found and "url(#name-c1)" in found
        assert "axes_1" not in found and "metadata" not in found and "<style" not in found
        assert "http" not in found and "font-family" not in found and "width" not in found
        assert "var(--s1)" in found and "var(--ink)" in found and 'd="M 0 0 L 1 1"' in found
        assert "a &lt; b" in found

    @pytest.mark.parametrize("runs", [1, 3, 11])
    def test_of_runs(self, runs: int) -> None:
        """Colours are variables; those of more than eight runs begin again."""
        x = np.array([10.0, 20, 4000])
        curves = [
            plots.Curve(i, x * (i + 1), x / 5000, x / 1e5, x.astype(int)) for i in range(runs)
        ]
        for draw in (plots.runs_over_evaluations, plots.accuracy_by_evaluations):
            found = draw("a", curves)
            assert f"var(--s{min(runs, 8) - 1})" in found and "var(--s8)" not in found
            assert "#0000" not in found and "<text" in found and len(found) < 60_000
        shares = [plots.Curve(i, x / 4000, x / 5000, x / 1e5, x.astype(int)) for i in range(runs)]
        for draw in (plots.reliability, plots.coverage):
            assert f"var(--s{min(runs, 8) - 1})" in draw("b", shares)

    def test_one_image_of_one_evaluation(self) -> None:
        one = [plots.Curve(0, np.array([1.0]), np.array([1.0]), np.zeros(1), np.ones(1, int))]
        for draw in (plots.accuracy_by_evaluations, plots.reliability, plots.coverage):
            assert draw("a", one).startswith("<svg")

    def test_the_same_twice(self) -> None:
        curves = [plots.Curve(0, np.array([1.0, 2.0]), np.array([0.5, 1.0]))]
        assert plots.coverage("a", curves) == plots.coverage("a", curves)


class TestThumbnails:
    @staticmethod
    def pixels(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "F", "LA"])
    def test_modes(self, mode: str) -> None:
        uri, size, _ = thumbnail(Image.new(mode, (300, 200)), 160)
        assert size == (160, 107) and uri.startswith("data:image/jpeg;base64,")
        assert self.pixels(uri).size == (160, 107)

    def test_small_ones_keep_their_pixels(self) -> None:
        image = noise_picture((8, 4), 90)
        uri, size, pixelated = thumbnail(image, 160)
        assert size == (160, 80) and pixelated
        assert self.pixels(uri).tobytes() == image.tobytes()

    @pytest.mark.parametrize("size", [(65, 65), (5000, 1), (1, 900)])
    def test_odd_sizes(self, size: tuple[int, int]) -> None:
        image = Image.new("RGB", size)
        _, shown, pixelated = thumbnail(image, 160)
        assert max(shown) <= 160 and min(shown) >= 1 and not pixelated
        assert image.size == size  # not changed
