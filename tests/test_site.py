"""The site of ``make docs``: it builds without a warning, and every link and name is there."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import dive_fast

pytest.importorskip("mkdocs", reason="the site needs the extra docs")
pytest.importorskip("material", reason="the site needs the extra docs")
pytest.importorskip("mkdocstrings", reason="the site needs the extra docs")

ROOT = Path(__file__).parents[1]
HOOKS = ROOT / "docs" / "site_hooks.py"


def build(config: Path, out: Path) -> None:
    """As ``make docs`` does; a warning is a failure."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"]
        + ["--config-file", str(config), "--site-dir", str(out)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what the browser loads for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.update(filter(None, (found.get("id"), found.get("name"))))
        target = found.get("href") or found.get("src")
        if target is not None:
            (self.links if tag == "a" else self.loaded).append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "site"
    build(ROOT / "mkdocs.yml", out)
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_there(site: Path) -> None:
    for path in sorted((ROOT / "docs").rglob("*.md")):
        folder = site / path.relative_to(ROOT).with_suffix("")
        assert (folder / "index.html").is_file(), path
    assert "<h1" in (site / "index.html").read_text()  # of README.md


def test_no_link_leads_nowhere(site: Path, pages: dict[Path, Page]) -> None:
    wrong = []
    for path, page in pages.items():
        for target in (*page.links, *page.loaded):
            parts = urlsplit(target)
            if parts.scheme in ("https", "mailto", "data"):
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            to = to / "index.html" if to.is_dir() else to
            anchors = pages[to].anchors if to in pages else {""}
            if not to.is_file() or unquote(parts.fragment) not in anchors:
                wrong.append(f"{path.relative_to(site)}: {target}")
    assert wrong == []


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    loaded = {target for page in pages.values() for target in page.loaded}
    assert loaded and not [target for target in loaded if urlsplit(target).netloc]


def public_names() -> Iterator[set[str]]:
    """All functions and classes that dive_fast and its rooms name as public, by their paths."""
    for name in dive_fast.__all__:
        if not name.startswith("_"):
            yield {f"dive_fast.{name}", f"{dive_fast._HOMES[name]}.{name}"}
    for room in (*dive_fast._ROOMS, "strategies.layout"):
        module = importlib.import_module(f"dive_fast.{room}")
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield {f"{module.__name__}.{name}"}


def test_every_public_name_is_described(pages: dict[Path, Page], site: Path) -> None:
    """A name that is missing has no docstring, or no page of docs/api/ names its room."""
    api = [page.anchors for path, page in pages.items() if "api" in path.relative_to(site).parts]
    described = set().union(*api)
    names = list(public_names())
    assert len(names) > 60
    assert [paths for paths in names if paths.isdisjoint(described)] == []


class TestOfAnyRepository:
    """Links as on GitHub, from a repository that has them all."""

    @pytest.fixture
    def repository(self, tmp_path: Path) -> Path:
        root = tmp_path / "repository"
        for name, text in {
            "README.md": "# Top\n\n[a](docs/a.md#part) ![shown](docs/images/x.png) [l](LICENSE)\n",
            "docs/a.md": "# A\n\n[home](../README.md) [rows](../bench/rows.jsonl)\n\n## Part\n",
            "docs/deep/b.md": "# B\n\n[a](../a.md) [rows](../../bench/rows.jsonl)\n",
            "docs/images/x.png": "no real image",
            "docs/unlinked.txt": "stays at home",
            "bench/rows.jsonl": "{}\n",
            "LICENSE": "free\n",
            "mkdocs.yml": f"site_name: x\ndocs_dir: docs\nhooks: ['{HOOKS}']\n"
            "nav: [{Home: README.md}, docs/a.md]\n"
            "validation: {nav: {omitted_files: warn}, links: {anchors: warn}}\n",
        }.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return root

    def test_links_stay_as_they_are(self, repository: Path, tmp_path: Path) -> None:
        out = tmp_path / "site"
        build(repository / "mkdocs.yml", out)
        for name in ("bench/rows.jsonl", "LICENSE", "docs/images/x.png"):
            assert (out / name).read_bytes() == (repository / name).read_bytes()
        assert not list(out.rglob("unlinked*"))
        assert "docs/a/#part" in Page(out / "index.html").links
        assert {"../..", "../../bench/rows.jsonl"} <= set(Page(out / "docs/a/index.html").links)

    def test_a_page_that_no_one_named_is_under_more(self, repository: Path, tmp_path: Path) -> None:
        build(repository / "mkdocs.yml", tmp_path / "site")
        home = (tmp_path / "site" / "index.html").read_text()
        assert ">More" in home and 'href="docs/deep/b/"' in home

    @pytest.mark.parametrize("link", ["docs/none.md", "docs/a.md#none", "bench/none.jsonl"])
    def test_a_broken_link_is_a_failure(self, link: str, repository: Path, tmp_path: Path) -> None:
        with (repository / "README.md").open("a") as file:
            file.write(f"\n[broken]({link})\n")
        with pytest.raises(AssertionError, match="none"):
            build(repository / "mkdocs.yml", tmp_path / "site")


# -- in a browser ----------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is here")
    # Nothing of the browser's own reaches for the network.
    quiet = "--no-first-run --disable-background-networking --disable-component-update"
    flags = f"--no-sandbox --disable-gpu --disable-quic --disable-sync {quiet}".split()
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address: str):
    """A page that must not say anything on its console, and ask nobody else for anything."""
    said: list[str] = []
    opened = browser.new_page()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
    opened.on(
        "request",
        lambda request: request.url.startswith((address, "data:")) or said.append(request.url),
    )
    yield opened
    opened.close()
    assert said == []


def test_search(page, address: str) -> None:
    page.goto(address)
    page.click("input.md-search__input")
    page.keyboard.type("fit_timesteps")
    result = page.locator(".md-search-result__link", has_text="fit_timesteps").first
    result.wait_for()
    result.click()
    page.wait_for_url(f"{address}docs/**")
    assert page.locator("h1").count() == 1


def test_a_page_of_the_api(page, address: str) -> None:
    page.goto(f"{address}docs/api/classifier/#dive_fast.DiffusionClassifier.calibrate")
    heading = page.locator("[id='dive_fast.DiffusionClassifier.calibrate']").first
    assert heading.evaluate("e => e.getBoundingClientRect().top < window.innerHeight")
    page.get_by_role("link", name="Strategies", exact=True).first.click()
    page.wait_for_url(f"{address}docs/api/strategies/")
    assert page.locator("h1").inner_text().startswith("Strategies")


def test_the_theme_can_be_dark(page, address: str) -> None:
    page.emulate_media(color_scheme="dark")
    page.goto(address)
    assert page.locator("body").get_attribute("data-md-color-scheme") == "slate"
