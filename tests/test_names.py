"""Names of classes, compared as people write them."""

import unicodedata

import pytest

from dive_fast.core.distinct import told_apart, without_row
from dive_fast.core.names import comparable
from dive_fast.models.files.checkpoint import read_class_names


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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["cat", "dog", "cat"], ["cat (0)", "dog", "cat (2)"]),
        (["a"] * 3, ["a (0)", "a (1)", "a (2)"]),
        # A made name that is there already, itself made or not.
        (["a", "a", "a (0)"], ["a (0) (0)", "a (1)", "a (0)"]),
        (["a (1)", "a", "a", "a (1)"], ["a (1) (0)", "a (1) (1)", "a (2)", "a (1) (3)"]),
        (["caf\u00e9", "cafe\u0301"], ["caf\u00e9 (0)", "cafe\u0301 (1)"]),
    ],
)
def test_equal_names_get_their_rows(names, expected, caplog):
    made = told_apart(names, "a list")
    assert list(made) == expected and len(set(made)) == len(names)
    plain = [unicodedata.normalize("NFC", name) for name in names]
    for row, name in enumerate(made):
        if name != names[row]:
            assert without_row(name, row) == without_row(plain[row], row)
    told = [repr(new) for old, new in zip(names, made, strict=True) if old != new]
    assert len(caplog.messages) == bool(told)
    assert all(name in caplog.messages[0] for name in told)


def test_many_equal_names_are_one_line(caplog):
    told_apart(["a"] * 6)
    assert caplog.messages == [
        "classes of the same name are told apart by their rows: 'a (0)', 'a (1)', 'a (2)', 'a (3)' "
        "and 2 more."
    ]


def test_a_row_that_is_not_its_own_belongs_to_the_name():
    assert without_row("Apollo (11)", 3) == "Apollo (11)"


def test_equal_labels_of_a_model_get_their_rows(caplog):
    labels = {"2": "crane", "0": "crane", "1": "cat"}
    assert read_class_names({"id2label": labels}, 3) == ("crane (0)", "cat", "crane (2)")
    (line,) = caplog.messages
    assert line.startswith("id2label: classes of the same name") and "'crane (2)'" in line
    assert read_class_names({"id2label": {"0": "cat", "1": 7}}, 2) == ("cat", "7")
    assert len(caplog.messages) == 1
