"""The page in a real browser, headless Chromium: what a person does with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_runs import NAMES, answer, write_folder, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser needs playwright")
pytest.importorskip("jinja2", reason="reports need jinja2")
pytest.importorskip("matplotlib", reason="reports need matplotlib")
pytest.importorskip("sklearn", reason="reports need scikit-learn")

from dive_fast.report import write_report  # noqa: E402

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    with sync_api.sync_playwright() as playwright:
        path = path or playwright.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("no Chromium is installed")
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one with a name that is long and has no place to break."""
    folder = tmp_path_factory.mktemp("runs")
    photos = write_folder(folder / "photos", side=300)
    long = [
        answer("ant/1.png", 1, [0.2, 0.2, 0.6], evaluations=1000),
        answer("x" * 90, 0, [1, 0, 0]),
    ]
    runs = [
        write_run(folder / "first", data=str(photos)),
        write_run(folder / ("second" * 12), long, NAMES, str(photos), strategy="enumerate"),
    ]
    write_report(runs, folder / "page.html")
    return folder / "page.html"


class Opened:
    """A page, with what it said and asked for."""

    def __init__(self, browser, path: Path, **options: object) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def colour(self, selector: str, name: str = "backgroundColor") -> str:
        return self.page.eval_on_selector(selector, f"e => getComputedStyle(e).{name}")


@pytest.fixture(scope="module")
def desktop(browser, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report, viewport=DESKTOP, color_scheme="light")
    yield opened
    opened.context.close()


@pytest.fixture
def headline(desktop: Opened):
    """The rows' first cells of the sortable headline, and its heads."""
    desktop.page.reload()
    return desktop.page.locator("#figures table.sortable")


def firsts(table) -> list[str]:
    return [text.split("\n")[0].strip()[:6] for text in table.locator("tbody th").all_inner_texts()]


def test_it_loads_without_errors_and_asks_for_nothing(desktop: Opened, report: Path) -> None:
    assert desktop.said == []
    assert [a for a in desktop.asked if not a.startswith("data:")] == [report.as_uri()]
    loaded = desktop.page.evaluate(
        "[...document.images].map(i => i.complete && i.naturalWidth > 0)"
    )
    assert len(loaded) > 3 and all(loaded)


def test_tables_sort_by_click(headline) -> None:
    head = headline.locator("thead th", has_text="Evaluations")
    assert firsts(headline) == ["first", "second"] and head.get_attribute("aria-sort") is None
    head.locator("button").click()
    assert firsts(headline) == ["second", "first"]
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    assert firsts(headline) == ["first", "second"]
    assert head.get_attribute("aria-sort") == "ascending"
    other = headline.locator("thead th", has_text="Accuracy")
    other.locator("button").click()
    assert head.get_attribute("aria-sort") is None
    assert other.get_attribute("aria-sort") == "descending"


def test_tables_sort_by_keyboard(desktop: Opened, headline) -> None:
    button = headline.locator("thead th", has_text="Run").locator("button")
    button.focus()
    desktop.page.keyboard.press("Enter")
    assert firsts(headline) == ["first", "second"]
    desktop.page.keyboard.press("Space")
    assert firsts(headline) == ["second", "first"]
    assert desktop.page.locator("#said").inner_text() == "Sorted by Run, descending."
    assert button.evaluate("e => e === document.activeElement")


def test_what_has_no_number_stands_last(desktop: Opened) -> None:
    """In whichever order: the recall of a class without images."""
    desktop.page.reload()
    table = desktop.page.locator("#classes table")
    button = table.locator("thead button").nth(3)
    for _ in range(2):
        button.click()
        assert table.locator("tbody tr").last.locator("td").last.inner_text() == "–"


def test_the_first_stop_of_the_keyboard_leads_to_the_content(desktop: Opened) -> None:
    desktop.page.reload()
    desktop.page.keyboard.press("Tab")
    assert desktop.page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert desktop.page.locator(".skip").bounding_box()["y"] >= 0
    desktop.page.keyboard.press("Enter")
    assert desktop.page.evaluate("document.activeElement.id") == "main"


def test_numbers_unfold_by_keyboard(desktop: Opened) -> None:
    desktop.page.reload()
    table = desktop.page.locator("#confidence details table").first
    assert not table.is_visible()
    desktop.page.locator("#confidence summary").first.focus()
    desktop.page.keyboard.press("Enter")
    assert table.is_visible()


@pytest.mark.parametrize("unfolded", [False, True])
def test_a_phone_needs_no_sideways_scroll(browser, report: Path, unfolded: bool) -> None:
    phone = Opened(browser, report, viewport=PHONE, is_mobile=True, has_touch=True)
    if unfolded:
        phone.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    assert phone.page.evaluate("window.innerWidth") == 390  # not zoomed out to fit
    small = phone.page.evaluate(
        """[...document.querySelectorAll('a, button, summary')].filter(e => {
             const box = e.getBoundingClientRect();
             return box.width && e.className !== 'skip' && box.height < 24;
           }).map(e => e.textContent)"""
    )
    assert small == []  # WCAG 2.2, 2.5.8
    phone.context.close()


def test_light_and_dark(browser, report: Path, desktop: Opened) -> None:
    dark = Opened(browser, report, viewport=DESKTOP, color_scheme="dark")
    assert desktop.colour("body") == "rgb(245, 246, 248)"
    assert dark.colour("body") == "rgb(16, 21, 27)"
    # The drawings change with it.
    text = ".drawing svg text"
    assert desktop.colour(text, "fill") == "rgb(22, 32, 43)"
    assert dark.colour(text, "fill") == "rgb(231, 236, 241)"
    assert dark.said == []
    dark.context.close()


def test_without_scripts_it_is_complete(browser, report: Path) -> None:
    opened = Opened(browser, report, viewport=DESKTOP, java_script_enabled=False)
    assert opened.page.locator("button").count() == 0
    heads = opened.page.locator("#figures thead th").all_inner_texts()
    assert heads[:2] == ["Run", "Accuracy"]
    assert opened.page.locator("#figures tbody tr").count() == 2
    assert opened.said == []
    opened.context.close()


def test_print_unfolds_everything(desktop: Opened) -> None:
    desktop.page.reload()
    closed = desktop.page.locator("details:not([open])").count()
    desktop.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert closed > 3 and desktop.page.locator("details:not([open])").count() == 0
    desktop.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert desktop.page.locator("details:not([open])").count() == closed


def test_paper_is_wide_enough(browser, report: Path) -> None:
    """A4 with margins of 1 cm is 718 CSS pixels wide."""
    paper = Opened(browser, report, viewport={"width": 718, "height": 1000})
    paper.page.emulate_media(media="print")
    assert paper.page.evaluate("document.documentElement.scrollWidth") <= 718
    assert not paper.page.locator("nav").is_visible()
    paper.context.close()
