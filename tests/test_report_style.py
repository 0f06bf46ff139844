"""Colours of the page: every text has a contrast of 4.5 to 1, every mark of 3 to 1 (WCAG 2.2)."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

import dive_fast.report

STYLE = (Path(dive_fast.report.__file__).parent / "templates" / "style.css").read_text()
SCHEMES = ("light", "dark")
SURFACES = ("page", "surface")


def schemes() -> dict[str, dict[str, str]]:
    """The variables of each colour scheme."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks[:2])
    assert set(light) == set(dark) and len(light) > 25
    return {"light": light, "dark": dark}


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_yardstick() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # WCAG's known example


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("text", ["ink", "muted", "accent", "good", "bad"])
def test_texts(scheme: str, text: str) -> None:
    colours = schemes()[scheme]
    for ground in SURFACES:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_notes_and_frames(scheme: str) -> None:
    colours = schemes()[scheme]
    assert contrast(colours["ink"], colours["note"]) >= 4.5
    assert contrast(colours["muted"], colours["track"]) >= 4.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("series", range(8))
def test_marks(scheme: str, series: int) -> None:
    colours = schemes()[scheme]
    for ground in SURFACES:
        assert contrast(colours[f"s{series}"], colours[ground]) >= 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ramp", "yn")
def test_cells_of_the_matrix(scheme: str, ramp: str) -> None:
    """Each step can be read, and is farther from the ground than the one before."""
    colours = schemes()[scheme]
    inks = ["ink", "ink", "mid-ink", "mid-ink", "high-ink", "high-ink"]
    for step, ink in enumerate(inks, start=1):
        assert contrast(colours[ink], colours[f"{ramp}{step}"]) >= 4.5, step
    steps = [contrast(colours[f"{ramp}{i}"], colours["surface"]) for i in range(1, 7)]
    assert all(a < b for a, b in pairwise(steps)), steps
    rules = dict(re.findall(r"\.(?:\w\d, )*(\w\d) \{ color: var\(--([\w-]+)\)", STYLE))
    assert rules == {"n4": "mid-ink", "n6": "high-ink"}


def test_every_variable_is_there() -> None:
    used = set(re.findall(r"var\(--([\w-]+)\)", STYLE)) - {"c", "w"}
    assert used <= set(schemes()["light"])
    assert not re.search(r"#[0-9a-f]{3,6}", re.sub(r":root \{.*?\}", "", STYLE, flags=re.S))


def test_who_wants_no_motion_gets_none() -> None:
    assert "prefers-reduced-motion: reduce" in STYLE and "@media print" in STYLE
