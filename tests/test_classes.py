"""Class maps: names to labels, colours, and what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.classes import IGNORE, ClassMap, Color, default_color, is_ignored
from darefine_qupath.errors import ClassMapError

BYTE = st.integers(0, 255)
NAME = st.text(st.characters(exclude_characters="*", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(BYTE, BYTE, BYTE)
@settings(deadline=None, derandomize=True)
def test_a_colour_survives_both_of_its_spellings(red: int, green: int, blue: int) -> None:
    color = Color(red, green, blue)
    assert Color.from_hex(color.hex) == color
    assert Color.from_argb(color.argb) == color


def test_argb_is_the_signed_integer_of_java() -> None:
    assert Color(200, 0, 0).argb == -3670016
    assert Color.from_argb(0xFFC80000) == Color(200, 0, 0)


@pytest.mark.parametrize("text", ["", "#12345", "red", "#gg0000", "#1234567"])
def test_other_text_is_not_a_colour(text: str) -> None:
    with pytest.raises(ClassMapError, match="is not a colour; write it as #rrggbb"):
        Color.from_hex(text)


def test_default_colours_are_fixed_per_name() -> None:
    assert default_color("In situ") == default_color("in situ") == Color(240, 170, 40)
    assert default_color("Gland") == default_color("Gland")


@pytest.mark.parametrize(
    ("name", "ignored"), [("Ignore*", True), ("Region*", True), ("Tumor", False), ("a*b", False), (None, False)]
)
def test_a_star_at_the_end_takes_a_class_out(name: str | None, ignored: bool) -> None:
    assert is_ignored(name) is ignored


def test_labels_follow_the_order_of_the_names() -> None:
    classes = ClassMap(names=("Normal", "Invasive"), sources={"IDC": "Invasive", "ILC": "Invasive"})
    assert [classes.label(name) for name in ("Normal", "Invasive", "IDC", "ILC")] == [0, 1, 1, 1]
    assert classes.label("Ignore*") == IGNORE
    assert classes.num_classes == 2


def test_an_unknown_class_is_refused_by_name() -> None:
    with pytest.raises(ClassMapError, match=r"'Fat' is not one of \['Normal'\]; map it in darefine.toml"):
        ClassMap(names=("Normal",)).label("Fat")


def test_check_lists_every_unknown_class_with_its_count() -> None:
    classes = ClassMap(names=("Normal",), sources={"Benign": "Normal"})
    classes.check({"Normal": 3, "Benign": 1, "Ignore*": 2})
    with pytest.raises(ClassMapError, match=r"not mapped: 'Fat' \(2\), 'Mucus' \(7\); known are"):
        classes.check({"Mucus": 7, "Normal": 1, "Fat": 2})


def test_knows_says_what_check_would_take() -> None:
    classes = ClassMap(names=("Normal",), sources={"Benign": "Normal"})
    assert [classes.knows(name) for name in (None, "Ignore*", "Normal", "Benign", "Fat")] == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ()}, "at least one class"),
        ({"names": tuple(f"c{i}" for i in range(256))}, "256 classes are more than the 255"),
        ({"names": ("A", "A")}, "named twice"),
        ({"names": ("A", "Ignore*")}, r"\['Ignore\*'\] end in '\*'"),
        ({"names": ("A", "B"), "colors": (Color(1, 2, 3),)}, "1 colours for 2 classes"),
        ({"names": ("A",), "sources": {"B": "C"}}, "'B' is mapped to 'C', which is not in"),
        ({"names": ("A", "B"), "sources": {"A": "B"}}, "'A' is a training class and is mapped to 'B'"),
        ({"names": ("A",), "unlabelled": "B"}, "unlabelled = 'B' is neither"),
        ({"names": ("A",), "region_unlabelled": "B"}, "region_unlabelled = 'B' is neither"),
    ],
    ids=["empty", "too many", "twice", "star", "colors", "target", "self", "unlabelled", "region"],
)
def test_a_map_that_makes_no_sense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ClassMapError, match=message):
        ClassMap(**arguments)  # type: ignore[arg-type]


def test_unlabelled_pixels_are_ignored_or_a_class() -> None:
    assert ClassMap(names=("A", "B")).unlabelled_label == IGNORE
    assert ClassMap(names=("A", "B")).region_unlabelled_label == IGNORE
    classes = ClassMap(names=("A", "B"), unlabelled="B", region_unlabelled="A")
    assert (classes.unlabelled_label, classes.region_unlabelled_label) == (1, 0)


@given(st.lists(NAME, min_size=1, max_size=6, unique=True), st.data())
@settings(deadline=None, derandomize=True)
def test_json_gives_the_same_map_back(names: list[str], data: st.DataObject) -> None:
    others = data.draw(st.dictionaries(NAME.filter(lambda name: name not in names), st.sampled_from(names), max_size=3))
    classes = ClassMap(names=tuple(names), sources=others, unlabelled=data.draw(st.sampled_from(names)))
    assert ClassMap.from_json(classes.to_json()) == classes


@pytest.mark.parametrize("data", [{}, {"names": ["A"], "colors": None}], ids=["empty", "null"])
def test_other_json_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ClassMapError, match="Not a class map"):
        ClassMap.from_json(data)
