"""``dive-fast app`` as a real server: asked by gradio's client, and in a real browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from pictures import noise_picture
from PIL import Image

ROOT = Path(__file__).parents[1]

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'dive_fast[app]'")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


class Server(NamedTuple):
    """A running page.

    Attributes:
        models: digits and scenes of the zoo, a small detector, a small Stable Diffusion.
        temporary: where it may leave files.
    """

    url: str
    models: list[str]
    temporary: Path
    process: subprocess.Popen


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@contextlib.contextmanager
def served(folder: Path, *arguments: object) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a page, in a process of its own that is ended as a person would."""
    command = [sys.executable, "-m", "dive_fast", "app", "--port", str(free_port())]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    with open(folder / "stderr", "w+") as errors:
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            line = process.stdout.readline()
            assert line.startswith("dive-fast: http://127.0.0.1:"), (line, errors.read())
            yield line.split()[1], process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            errors.seek(0)
            said = errors.read()
    assert process.returncode == 0 and "Traceback" not in said, said


@pytest.fixture(scope="module")
def server(tmp_path_factory, layout_dir, sd) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    models = ["digits", "scenes", str(layout_dir), str(sd)]
    options = [option for model in models for option in ("--model", model)]
    with served(folder, *options, "--classes", "cat,dog") as (url, process):
        yield Server(url, models, folder, process)
    # Uploads, examples and drawings are gone, and nothing was written beside them.
    assert [path.name for path in folder.iterdir()] == ["stderr"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """three.png, scene.png, photo.png, and bad.png that is none."""
    from dive_fast.data.digits import load_digits
    from dive_fast.data.scenes import load_scenes

    folder, part = tmp_path_factory.mktemp("pictures"), load_digits("test")
    Image.fromarray(part.images[(part.labels == 3).argmax()]).save(folder / "three.png")
    Image.fromarray(load_scenes("test", 1).images[0]).save(folder / "scene.png")
    noise_picture((40, 30), 80).save(folder / "photo.png")
    (folder / "bad.png").write_text("no picture")
    return folder


# -- by gradio's client ----------------------------------------------------------------------------


class Asked(NamedTuple):
    """What the page shows in the end."""

    status: str
    bars: dict | None
    drawn: str | None
    table: str
    map: str


@pytest.fixture
def client(server, tmp_path):
    from gradio_client import Client

    return Client(server.url, verbose=False, analytics_enabled=False, download_files=str(tmp_path))


def question(model: str, picture: Path | None, **changes: object) -> dict:
    from gradio_client import handle_file

    asked = {
        "model": model,
        "picture": None if picture is None else handle_file(str(picture)),
        "classes": "",
        "template": "",
        "strategy": "auto",
        "min_agreement": 0.95,
        "budget": "",
        "probes": "",
        "seed": "0",
        "where": True,
    }
    return {**asked, **changes, "api_name": "/ask"}


def test_a_picture_is_classified(client, pictures) -> None:
    from dive_fast import DiffusionClassifier

    path = pictures / "three.png"
    asked = Asked(*client.predict(**question("digits", path, min_agreement=0.9)))
    (expected,) = DiffusionClassifier.from_pretrained("digits")(str(path), min_agreement=0.9)
    assert asked.bars["label"] == "three"
    assert asked.bars["confidences"][0]["confidence"] == pytest.approx(
        expected.probability, abs=1e-4
    )
    assert f"({expected.evaluations} evaluations, " in asked.status
    assert asked.drawn is None and '<th scope="row">three</th>' in asked.table
    budget = Asked(*client.predict(**question("digits", path, budget="20")))
    assert "(20 evaluations, " in budget.status
    probes = Asked(*client.predict(**question("digits", path, strategy="enumerate", probes="7")))
    assert "(70 evaluations, " in probes.status
    assert '<img src="data:image/png;base64,' in asked.map
    assert "Where it is three rather" in asked.map
    assert "64 evaluations in addition" in asked.map and "12 evaluations in" in probes.map
    without = Asked(*client.predict(**question("digits", path, where=False)))
    assert without.map == "" and without.bars["label"] == "three"


def test_objects_are_found(client, server, pictures) -> None:
    from dive_fast import LayoutDetector

    model, path = server.models[2], pictures / "photo.png"
    asked = Asked(*client.predict(**question(model, path, strategy="guided", probes="12")))
    (expected,) = LayoutDetector.from_pretrained(model)(str(path), probes=12)
    assert not asked.bars and asked.map == ""
    drawn = Image.open(asked.drawn)
    assert drawn.tobytes() == expected.draw(str(path)).tobytes()
    for label in expected.labels:
        assert f'<th scope="row">{label}</th>' in asked.table


def test_a_search_is_seen_and_stopped(client, pictures) -> None:
    job = client.submit(**question("scenes", pictures / "scene.png", strategy="guided"))
    deadline = time.monotonic() + 60
    while not any("object" in output[0] for output in job.outputs()):
        assert time.monotonic() < deadline, job.outputs()
        time.sleep(0.2)
    client.predict(api_name="/stop")
    # What was known is still there.
    status, _, drawn, table, _ = job.result(60)
    assert "told stopped" in status and "Stopped: " in status
    assert Path(drawn["path"] if isinstance(drawn, dict) else drawn).suffix == ".png"
    assert table == ""
    # And another question may follow.
    after = Asked(*client.predict(**question("digits", pictures / "three.png")))
    assert after.bars["label"] == "three"


def test_other_classes_are_asked_about(client, server, pictures) -> None:
    from dive_fast import DiffusionClassifier

    model, path = server.models[3], pictures / "photo.png"
    given = {"classes": "a fox\nan owl\ncat", "template": "{}!", "strategy": "enumerate"}
    asked = Asked(*client.predict(**question(model, path, probes="4", **given)))
    names = ["a fox", "an owl", "cat"]
    clf = DiffusionClassifier.from_pretrained(model, classes=names, templates=["{}!"])
    (expected,) = clf(str(path), strategy="enumerate", probes=4)
    found = {entry["label"]: entry["confidence"] for entry in asked.bars["confidences"]}
    assert found == pytest.approx(
        {entry["label"]: entry["score"] for entry in expected.top(3)}, abs=1e-3
    )


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (0, {"picture": None}, "expected a picture, got none: drop one, or pick an example"),
        (0, {"picture": "bad.png"}, "bad.png: expected an image, got a file of no known"),
        (0, {"probes": "0"}, "the number of probes must be at least 1, got 0"),
        (0, {"budget": "1"}, "budget must be at least"),
        (0, {"probes": "2.5"}, "expected a whole number as probes, got '2.5'"),
        (0, {"min_agreement": 2}, "min_agreement must lie between 0 and 1, got 2"),
        (
            0,
            {"strategy": "guided"},
            "expected a strategy of auto, enumerate, invert, race, got 'guided'",
        ),
        (3, {"classes": "cat"}, "expected at least 2 classes, one a line, got 1"),
        (3, {"classes": "cat\ndog", "template": "a"}, "a template needs {} where the class goes"),
    ],
)
def test_wrong_input_is_a_sentence(client, server, pictures, model, changes, message) -> None:
    from gradio_client.exceptions import AppError

    picture = changes.pop("picture", "three.png")
    picture = picture and pictures / picture
    with pytest.raises(AppError) as caught:
        client.predict(**question(server.models[model], picture, **changes))
    said = str(caught.value)
    assert message in said and "Traceback" not in said
    assert str(server.temporary) not in said


def test_only_this_machine_is_let_in(server) -> None:
    port = int(server.url.rstrip("/").rpartition(":")[2])
    with socket.socket() as other:
        other.settimeout(2)
        # Another address of this machine's loopback net: bound to 127.0.0.1 alone, it is closed.
        assert other.connect_ex(("127.0.0.2", port)) != 0


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the tests of the page need playwright"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no Chromium here: none of {', '.join(names)}")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page at the width of a phone; no error and no foreign request may have come of it."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    local = (server.url, "data:", f"blob:{server.url}")
    page.on("request", lambda r: None if r.url.startswith(local) else wrong.append(r.url))
    page.goto(server.url)
    page.get_by_role("button", name="Classify").wait_for()
    yield page
    page.close()
    assert wrong == []


def upload(page, picture: Path) -> None:
    with page.expect_response(lambda r: "/upload" in r.url and r.ok):
        page.set_input_files("input[type=file]", str(picture))
    page.get_by_alt_text("The picture that is asked about").wait_for(state="attached")


def fits(page) -> bool:
    """Whether nothing makes the page wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def choose(page, model: str) -> None:
    page.get_by_label("Model").click()
    page.get_by_role("option", name=model, exact=True).click()


def test_a_picture_is_dropped(page, pictures) -> None:
    assert fits(page)
    upload(page, pictures / "three.png")
    page.get_by_role("button", name="Classify").click()
    page.locator(".told.done").wait_for()
    assert page.locator(".told").inner_text().startswith("three, ")
    row = page.get_by_role("row", name="three")
    assert "answer" in row.inner_text()
    shown = page.get_by_role("img", name="red where three explains it better")
    shown.wait_for()
    assert shown.evaluate("image => [image.complete, image.naturalWidth]") == [True, 384]
    assert page.get_by_text("64 evaluations in addition").is_visible()
    assert "(64 " not in page.locator(".told").inner_text()
    assert fits(page)
    # A bad one in its place.
    page.get_by_label("Remove Image").click()
    upload(page, pictures / "bad.png")
    page.get_by_role("button", name="Classify").click()
    page.get_by_role("alert").wait_for()
    said = page.locator(".told").inner_text()
    assert said == "bad.png: expected an image, got a file of no known image format."
    assert page.get_by_role("table").count() == page.get_by_role("figure").count() == 0


def test_by_keyboard_alone(page) -> None:
    """An example, another strategy and the answer, and every control has a name."""
    page.get_by_role("button", name="five.png").focus()
    page.keyboard.press("Enter")
    page.get_by_alt_text("The picture that is asked about").wait_for(state="attached")
    page.get_by_label("auto").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.get_by_label("enumerate").is_checked()
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    assert page.get_by_label("Probes").input_value() == ""
    page.get_by_label("Probes").fill("3")
    page.get_by_label("Agreement").wait_for(state="detached")
    page.get_by_role("button", name="Classify").focus()
    page.keyboard.press("Enter")
    page.locator(".told.done").wait_for()
    assert "five" in page.locator(".told").inner_text()
    assert "(30 evaluations" in page.locator(".told").inner_text()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")].filter(
            e => e.offsetParent && !e.innerText && !e.getAttribute("aria-label") && !e.title
              && !e.labels?.length && !e.querySelector("img[alt]:not([alt=''])")
        ).map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_objects_come_and_are_stopped(page, pictures) -> None:
    choose(page, "scenes")
    page.get_by_role("button", name="Find objects").wait_for()
    assert page.get_by_label("guided").is_checked()
    assert page.get_by_label("Show where").count() == 0
    upload(page, pictures / "scene.png")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Probes").fill("144")  # so that it is not done before it is stopped
    page.get_by_role("button", name="Find objects").click()
    page.locator("#drawn img").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator(".told.stopped").wait_for()
    assert "object" in page.locator(".told").inner_text()
    assert fits(page)


def test_classes_are_typed(page, server, pictures) -> None:
    choose(page, server.models[3])
    box = page.get_by_label("Classes, one a line")
    box.wait_for()
    assert box.input_value() == "cat\ndog"
    upload(page, pictures / "photo.png")
    box.fill("a fox\nan owl\n<i>cat</i>")
    page.get_by_role("button", name="Classify").click()
    page.locator(".told.done").wait_for()
    rows = page.locator("tbody th").all_inner_texts()
    assert sorted(rows) == ["<i>cat</i>", "a fox", "an owl"]
    # The map is still under way, and a click before its end is not taken.
    page.locator("figure.where").wait_for()
    box.fill("a fox")
    page.get_by_role("button", name="Classify").click()
    page.get_by_role("alert").wait_for()
    assert "expected at least 2 classes" in page.locator(".told").inner_text()
    assert fits(page)
