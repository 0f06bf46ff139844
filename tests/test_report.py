"""The page of runs of classifiers: its numbers, its form, its pictures, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from pathlib import Path

import pytest
from html_tree import Element, cells, parse, table_of
from PIL import Image
from report_runs import ANSWERS, answer, write_folder, write_run

pytest.importorskip("jinja2", reason="reports need jinja2")
pytest.importorskip("matplotlib", reason="reports need matplotlib")
pytest.importorskip("sklearn", reason="reports need scikit-learn")

from dive_fast.errors import DataError  # noqa: E402
from dive_fast.report import write_report  # noqa: E402

EVIL = '<script>alert("1")</script>'


def page_of(*runs: Path, out: Path | None = None, **options: object) -> Element:
    out = out or runs[0].parent / "page.html"
    write_report(runs, out, **options)
    return parse(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Element:
    """The page of one run with pictures."""
    return page_of(write_run(tmp_path_factory.mktemp("one") / "first", data=str(folder)))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Element:
    """The page of two runs with pictures, of names that would be markup."""
    path = tmp_path_factory.mktemp("two")
    names = ("ant", "bee", "cat", EVIL)
    bad = [
        answer("ant/1.png", 0, [0.2, 0.2, 0.0, 0.6], names, evaluations=1000, groups={EVIL: EVIL})
    ]
    bad.append({"id": EVIL, "truth": 1, "error": f"{EVIL} & more"})
    second = write_run(path / "second", bad, names, str(folder), strategy="enumerate", probes=250)
    return page_of(write_run(path / "first", data=str(folder)), second)


class TestNumbers:
    def test_headline(self, one: Element) -> None:
        """3 of 4 right; recalls 1, 0 and 1; p of the right class 0.9, 0.5, 0.2, 0.7."""
        heads, row = cells(table_of(one, "The runs side by side"))
        found = dict(zip(heads, row, strict=True))
        assert found["Run"] == "first toy, auto"
        assert found["Accuracy"] == "75.0% ± 21.7"  # sqrt(0.75 0.25 / 4) = 0.2165
        assert found["Mean per class"].startswith("66.7%")
        # -(log 0.9 + log 0.5 + log 0.2 + log 0.7) / 4
        assert found["NLL"].startswith("0.691")
        # (0.02 + 0.42 + (0.05^2 + 0.8^2 + 0.75^2) + 0.14) / 4
        assert found["Brier"].startswith("0.446")
        assert found["Evaluations per image"] == "20" and found["Seconds per image"] == "0.500"
        assert found["Images"] == "4 1 failed"

    def test_tiles_of_a_single_run(self, one: Element) -> None:
        tiles = [tile.text for tile in one.one("dl", class_="tiles").all("div")]
        assert tiles[0] == "accuracy75.0%± 21.7%" and tiles[-1] == "images41 failed"

    def test_classes(self, one: Element) -> None:
        _, *rows = cells(table_of(one, "Recall, precision and F1"))
        assert rows[0] == ["ant", "2", "100.0% ± 0.0", "100.0%", "1.000", "2"]
        assert rows[1] == ["bee", "1", "0.0% ± 0.0", "–", "0.000", "0"]
        assert rows[2] == ["cat", "1", "100.0% ± 0.0", "50.0%", "0.667", "2"]

    def test_confusion(self, one: Element) -> None:
        (heat,) = [t for t in one.all("table") if t.attributes.get("class") == "heat"]
        head, *rows = cells(heat)
        assert head == ["right class", "ant", "bee", "cat"]
        assert rows == [["ant", "2", "", ""], ["bee", "", "", "1"], ["cat", "", "", "1"]]
        classes = [td.attributes.get("class") for td in heat.all("td")]
        assert classes == ["y6", None, None, None, None, "n6", None, None, "y6"]

    def test_groups(self, one: Element) -> None:
        _, *rows = cells(table_of(one, "Accuracy by eye"))
        assert rows == [["left", "2", "50.0% ± 35.4"], ["right", "2", "100.0% ± 0.0"]]

    def test_groups_that_are_numbers(self, tmp_path: Path) -> None:
        records = [answer(n, 0, [0.9, 0.1, 0.0], groups={"age": n}) for n in ("10", "9", "2.5")]
        page = page_of(write_run(tmp_path / "run", records))
        _, *rows = cells(table_of(page, "Accuracy by age"))
        assert [row[0] for row in rows] == ["2.5", "9", "10"]

    @pytest.mark.filterwarnings("ignore:A single label was found")
    def test_a_single_class(self, tmp_path: Path) -> None:
        page = page_of(write_run(tmp_path / "run", [answer("1", 0, [1.0], ["a"])], ["a"]))
        heads, row = cells(table_of(page, "The runs side by side"))
        found = dict(zip(heads, row, strict=True))
        assert found["Accuracy"] == "100.0% ± 0.0" and found["AUROC"] == "–"
        assert "No answer is wrong." in page.one("main").text

    def test_by_evaluations(self, one: Element) -> None:
        _, *rows = cells(table_of(one, "Accuracy by evaluations"))
        assert [row[1:] for row in rows] == [
            ["10", "100.0% ± 0.0", "2"],
            ["20", "0.0% ± 0.0", "1"],
            ["40", "100.0% ± 0.0", "1"],
        ]

    def test_reliability(self, one: Element) -> None:
        """Bins of 1 / 15: 0.5, 0.7, 0.75 and 0.9 lie in four of them."""
        _, *rows = cells(table_of(one, "Accuracy by the answer's probability"))
        assert [row[1:] for row in rows] == [
            ["46.7% to 53.3%", "50.0%", "100.0% ± 0.0", "1"],
            ["66.7% to 73.3%", "70.0%", "100.0% ± 0.0", "1"],
            ["73.3% to 80.0%", "75.0%", "0.0% ± 0.0", "1"],
            ["86.7% to 93.3%", "90.0%", "100.0% ± 0.0", "1"],
        ]

    def test_coverage(self, one: Element) -> None:
        """The surest first: right, wrong, right, right."""
        _, *rows = cells(table_of(one, "Accuracy of the most certain"))
        assert [(row[1], row[2].split()[0]) for row in rows] == [
            ("25.0%", "100.0%"), ("50.0%", "50.0%"), ("75.0%", "66.7%"), ("100.0%", "75.0%"),
        ]  # fmt: skip

    def test_the_drawing_says_its_numbers(self, one: Element) -> None:
        said = [
            e.attributes["aria-label"] for e in one.all("div") if e.attributes.get("role") == "img"
        ]
        assert said[0].endswith("first 100.0% at 10 and 100.0% at 40.")
        assert "75.0% of all are right, and 50.0% of the surest 50%" in said[2]

    def test_two_runs(self, two: Element) -> None:
        _, *rows = cells(table_of(two, "The runs side by side"))
        assert rows[0][1] == "75.0% ± 21.7 (best)" and rows[1][1] == "0.0% ± 0.0"
        assert rows[0][-3] == "20 (best)" and rows[1][-3] == "1,000"
        _, *rows = cells(table_of(two, "Accuracy and evaluations of each run"))
        assert rows == [
            ["first", "20.0", "75.0% ± 21.7", "4"],
            ["second", "1,000.0", "0.0% ± 0.0", "1"],
        ]
        _, *rows = cells(table_of(two, "Recall of each class"))
        assert rows[0] == ["ant", "2 / 1", "100.0% ± 0.0", "0.0% ± 0.0"]

    def test_settings_that_differ(self, two: Element) -> None:
        rows = {row[0]: row[1:] for row in cells(table_of(two, "All settings that differ"))[1:]}
        assert rows == {"strategy.name": ["auto", "enumerate"], "probes": ["100", "250"]}
        main = {row[0]: row[1:] for row in cells(table_of(two, "The main settings"))[1:]}
        assert main["strategy differs"] == ["auto", "enumerate"]
        assert main["model"] == ["toy", "toy"] and main["seed"] == ["0", "0"]

    def test_errors(self, two: Element) -> None:
        assert cells(table_of(two, "first: one image"))[1] == ["cat/2.png", "cat/2.png: cut off."]
        assert cells(table_of(two, "second: one image"))[1] == [EVIL, f"{EVIL} & more"]


class TestForm:
    @pytest.fixture(params=["one", "two"])
    def page(self, request: pytest.FixtureRequest) -> Element:
        return request.getfixturevalue(request.param)

    def test_language_and_one_title(self, page: Element) -> None:
        assert page.one("html").attributes["lang"] == "en"
        assert page.one("title").text and page.one("h1").text and page.one("main")

    def test_headings_are_in_order(self, page: Element) -> None:
        orders = [int(e.tag[1]) for e in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
        assert orders[0] == 1
        assert all(b <= a + 1 for a, b in zip(orders, orders[1:], strict=False)), orders

    def test_every_picture_has_a_text(self, page: Element) -> None:
        assert page.all("img")
        assert all(img.attributes["alt"] for img in page.all("img"))
        for drawing in page.all("svg"):
            assert drawing.attributes["aria-hidden"] == "true"
        drawings = [e for e in page.all("div") if e.attributes.get("role") == "img"]
        assert len(drawings) >= 3 and all(d.attributes["aria-label"] for d in drawings)

    def test_tables_say_what_they_are(self, page: Element) -> None:
        for table in page.all("table"):
            assert table.all("caption")[0].text
            assert all(th.attributes["scope"] in ("row", "col") for th in table.all("th"))
            n = len(table.all("thead")[0].all("th"))
            assert all(len(row.all("th", "td")) == n for row in table.all("tr"))

    def test_ids_are_different_and_links_lead_somewhere(self, page: Element) -> None:
        ids = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
        assert len(set(ids)) == len(ids)
        links = [e.attributes["href"] for e in page.all("a", "use")]
        assert links and all(link[0] == "#" and link[1:] in ids for link in links)
        used = [m for e in page.all() for m in re.findall(r"url\(#(.*?)\)", str(e.attributes))]
        assert used and set(used) <= set(ids)

    def test_labels_of_regions_are_different(self, page: Element) -> None:
        labels = [
            e.attributes["aria-label"] for e in page.all() if e.attributes.get("role") == "region"
        ]
        assert len(set(labels)) == len(labels)

    def test_nothing_is_fetched(self, page: Element) -> None:
        """No address but of the page itself, and of the pictures in it."""
        for element in page.all():
            for name, value in element.attributes.items():
                assert "http" not in (value or "") or name == "http-equiv", (element.tag, name)
                if name in ("src", "href", "action", "srcset", "data"):
                    assert value.startswith(("#", "data:")), value
        text = "".join(e.text for e in page.all("style", "script"))
        assert not re.search(r"https?:|@import|url\(|fetch|XMLHttp|import\(", text)

    def test_there_is_one_script(self, page: Element) -> None:
        """And no attribute that would run."""
        assert len(page.all("script")) == 1
        assert not [n for e in page.all() for n in e.attributes if n.startswith("on")]


class TestEscapes:
    def test_names(self, two: Element) -> None:
        texts = [bdi.text for bdi in two.all("bdi")]
        assert texts.count(EVIL) > 5
        assert EVIL in [
            e.attributes.get("alt", "").partition("answered ")[2].split(" (")[0]
            for e in two.all("img")
        ]

    @pytest.mark.parametrize("name", ["a\x00b", "a\udcffb", "\u202eabc", "$x^2$", "_x", "日本語"])
    def test_odd_letters(self, tmp_path: Path, name: str) -> None:
        names = (name, "bee")
        records = [answer(f"1{name}", 0, [0.9, 0.1], names), answer("2", 1, [0.6, 0.4], names)]
        page = page_of(write_run(tmp_path / "run", records, names), pictures=2)
        shown = name.replace("\x00", "\\u0000").replace("\udcff", "\\udcff")
        _, *rows = cells(table_of(page, "Recall, precision and F1"))
        assert rows[0][0] == shown

    def test_a_run_directory_whose_name_is_markup(self, tmp_path: Path) -> None:
        page = page_of(write_run(tmp_path / "<b>&"), out=tmp_path / "page.html")
        assert page.one("h1").text == "<b>&" and not page.all("b")


class TestPictures:
    def test_the_worst_and_the_closest(self, one: Element) -> None:
        worst, closest = (ul for ul in one.all("ul") if ul.attributes.get("class") == "gallery")
        (wrong,) = worst.all("figure")
        assert wrong.text.startswith("bee/1.png wrong cat 75.0%")
        assert "bee ✓ (the right class) 20.0%" in wrong.text
        ids = [p.text.split()[0] for p in closest.all("p") if p.attributes["class"] == "id"]
        # Ahead by 0.1, 0.5, 0.55 and 0.8.
        assert ids == ["ant/2.png", "cat/1.png", "bee/1.png", "ant/1.png"]
        assert worst.one("img").attributes["alt"] == (
            "Image bee/1.png of the class bee, answered cat (75.0%)"
        )

    def test_pixels(self, one: Element) -> None:
        """The third picture, blue 200 and red 80, its small pixels kept."""
        img = [e for e in one.all("img") if "bee/1.png" in e.attributes["alt"]][0]
        kind, _, content = img.attributes["src"].partition(",")
        assert kind == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        assert picture.size == (20, 30) and picture.getpixel((3, 3)) == (80, 90, 200)
        assert (img.attributes["width"], img.attributes["height"]) == ("107", "160")

    def test_only_what_is_shown_is_opened(self, tmp_path: Path, monkeypatch) -> None:
        opened = []
        monkeypatch.setattr(
            "dive_fast.report.sources.as_image", lambda image: opened.append(image) or image
        )
        page_of(write_run(tmp_path / "run", data=str(write_folder(tmp_path / "p"))), pictures=1)
        assert len(opened) == 2

    def test_none(self, tmp_path: Path, folder: Path) -> None:
        page = page_of(write_run(tmp_path / "run", data=str(folder)), pictures=0)
        assert not page.all("img") and not page.all("ul", "li")[-1].text.startswith("Images")
        assert "images" not in [e.attributes.get("id") for e in page.all("section")]

    def test_data_that_are_named(self, tmp_path: Path, folder: Path) -> None:
        page = page_of(write_run(tmp_path / "run"), data=folder)
        assert len(page.all("img")) == 5

    @pytest.mark.parametrize(
        ("data", "expected"), [(None, "does not say where"), ("gone", "not found: gone: expected")]
    )
    def test_nowhere(self, tmp_path: Path, caplog, data: str | None, expected: str) -> None:
        """The page is made, and says so, as the log does."""
        run = write_run(tmp_path / "run", data=data)
        with caplog.at_level(logging.WARNING, "dive_fast"):
            (problem,) = write_report(run, tmp_path / "page.html")
        assert expected in problem and [r.getMessage() for r in caplog.records] == [problem]
        page = parse((tmp_path / "page.html").read_text())
        assert page.one("div", class_="notes").text == problem and not page.all("img")
        assert len(page.all("figure")) > 5

    def test_named_data_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nothing is there"):
            write_report(write_run(tmp_path / "run"), tmp_path / "page.html", data="gone")
        assert not (tmp_path / "page.html").exists()

    def test_other_pictures_of_the_same_ids(self, tmp_path: Path, folder: Path) -> None:
        data = {"source": "photos", "count": 4, "fingerprint": "of others"}
        run = write_run(tmp_path / "run", ANSWERS[:4], data=str(folder), **{"data_": 0})
        content = json.loads((run / "run.json").read_text())
        content["config"]["data"] = data
        (run / "run.json").write_text(json.dumps(content))
        (problem,) = write_report(run, tmp_path / "page.html")
        assert "are not the same" in problem

    def test_a_picture_of_another_class(self, tmp_path: Path, folder: Path) -> None:
        records = [answer("ant/1.png", 1, [0.9, 0.1, 0.0]), answer("ant/2.png", 0, [0.9, 0.1, 0])]
        page = page_of(write_run(tmp_path / "run", records, data=str(folder)))
        assert "No picture: the image of this id is of another class." in page.one("main").text
        assert len(page.all("img")) == 1

    def test_data_without_these_images(self, tmp_path: Path, folder: Path) -> None:
        run = write_run(tmp_path / "run", [answer("x.png", 0, [0.9, 0.1, 0.0])], data=str(folder))
        (problem,) = write_report(run, tmp_path / "page.html")
        assert "none of its images is in" in problem

    def test_a_picture_that_is_damaged(self, tmp_path: Path) -> None:
        photos = write_folder(tmp_path / "photos")
        (photos / "bee" / "1.png").write_bytes(b"no picture")
        page = page_of(write_run(tmp_path / "run", data=str(photos)))
        assert page.one("main").text.count("No picture: ") == 2
        assert len(page.all("img")) == 3


def test_the_settings_of_matplotlib_stay() -> None:
    """Somebody may draw in the same process."""
    from matplotlib import rcParams

    from dive_fast.report import plots

    keys = ("svg.fonttype", "svg.hashsalt", "font.size", "axes.grid", "text.parse_math")
    before = [rcParams[key] for key in keys]
    plots.coverage("a", [])
    assert [rcParams[key] for key in keys] == before
