"""Names of classes, compared as people write them."""

import unicodedata

import pytest

from dive_fast.core.names import comparable


@pytest.mark.parametrize(
    "spelling",
    ["traffic light", "Traffic Light", "traffic_light", "traffic-light", " traffic \t light\n"],
)
def test_spellings_of_the_same_words_are_alike(spelling):
    assert comparable(spelling) == "traffic light"


def test_decomposed_letters_are_the_composed_ones():
    composed = unicodedata.normalize("NFC", "Café Über")
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    assert comparable(decomposed) == comparable(composed) == "caf\u00e9 \u00fcber"


def test_other_words_stay_different():
    assert len({comparable(name) for name in ("cat", "cats", "c at", "kat", "cat 1")}) == 5


def test_surrogates_of_undecodable_file_names_pass():
    assert comparable("a\udcff_b") == "a\udcff b"
